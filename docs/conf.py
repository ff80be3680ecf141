"""How `make docs` builds the site: Markdown by MyST, furo's theme, nothing fetched from anywhere."""

project = "lora-sidecar"
extensions = ["myst_parser"]
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = "lora-sidecar"
html_copy_source = False
html_show_copyright = False
highlight_language = "none"
exclude_patterns = ["README.md"]
