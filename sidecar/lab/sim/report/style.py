"""How a page looks: colours of light and dark, and the little script that switches between them.

Runs are told apart by colour, dash and marker; colours are of different lightness, and keep apart for readers who see
no red or no green. Text has a contrast of 4.5 or more to what it stands on.
"""

from __future__ import annotations

from sidecar.lab.sim.report.markup import Markup, element

_LIGHT = """
--page:#f6f7f8;--card:#fff;--ink:#16191d;--soft:#59626d;--grid:#e7eaed;--axis:#b4bcc5;--lane:#f0f2f4;--edge:#e1e5e9;
--alert:#a11212;--alert-page:#fdecec;
--s0:#616b76;--s1:#0b5fb0;--s2:#bf4303;--s3:#00765a;--s4:#9b2f86;--s5:#7d5a00;
--answered:#7fb2de;--refused:#bf4303;--expired:#8a2f7c;--cancelled:#616b76;--failed:#8f0d0d;
--t0:#a9cfe8;--t1:#f7c78e;--t2:#a0dab6;--t3:#e6b9da;--t4:#f1e187;--t5:#bdbcec;--t6:#8dbbdc;--t7:#eaa28f;--t8:#83c4ab;
--t9:#cfa8cb;--t10:#d6c873;--on:#14202b;
"""
_DARK = """
--page:#0e1216;--card:#161b21;--ink:#e8ebee;--soft:#9ba6b2;--grid:#242c34;--axis:#4b5662;--lane:#1d242b;--edge:#252d35;
--alert:#ffb1a8;--alert-page:#3a1614;
--s0:#a3adb8;--s1:#62b3f7;--s2:#f79256;--s3:#3fcca0;--s4:#e992cf;--s5:#dcb94f;
--answered:#2f6ea8;--refused:#f79256;--expired:#e992cf;--cancelled:#a3adb8;--failed:#ff8577;
--t0:#2d6791;--t1:#8c5a20;--t2:#2c704b;--t3:#7f4272;--t4:#746712;--t5:#504e9e;--t6:#235380;--t7:#944333;--t8:#20685a;
--t9:#683b6a;--t10:#625e1c;--on:#f2f5f7;
"""
_SERIES = "".join(f".s{number}{{--own:var(--s{number})}}" for number in range(6))
_ADAPTERS = "".join(f".t{number}{{fill:var(--t{number})}}" for number in range(11))

STYLE = f"""
:root{{color-scheme:light;{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{_DARK}}}}}
:root[data-theme=dark]{{color-scheme:dark;{_DARK}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Liberation Sans",Arial,sans-serif;font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}}
header,main{{max-width:1480px;margin:0 auto;padding:0 28px}}
header{{padding-top:22px}}
.bar{{display:flex;justify-content:space-between;align-items:center;min-height:32px}}
.kicker{{margin:0;color:var(--soft);font-size:13px;letter-spacing:.04em}}
button{{font:inherit;font-size:13px;color:var(--ink);background:var(--card);border:1px solid var(--axis);
border-radius:6px;padding:4px 14px;cursor:pointer}}
button:hover{{border-color:var(--ink)}}
:focus-visible{{outline:2px solid var(--s1);outline-offset:2px}}
h1{{font-size:clamp(23px,2.3vw,33px);line-height:1.22;letter-spacing:-.012em;font-weight:650;margin:10px 0 8px;
text-wrap:balance;overflow-wrap:anywhere}}
.lead{{font-size:17px;max-width:88ch;margin:0 0 10px}}
.warning{{background:var(--alert-page);color:var(--alert);border-left:4px solid var(--alert);padding:8px 14px;
border-radius:4px;margin:8px 0;font-weight:600}}
.bindings{{margin:0 0 16px;padding-left:18px;color:var(--soft);max-width:120ch}}
.bindings li::marker{{color:var(--axis)}}
.facts{{display:flex;flex-wrap:wrap;gap:10px 34px;margin:0 0 20px;padding:12px 0 0;border-top:1px solid var(--edge)}}
dt{{font-size:12px;color:var(--soft)}}
dd{{margin:0;font-size:14px;overflow-wrap:anywhere}}
main{{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:18px;padding-bottom:40px}}
.card{{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:18px 22px 16px;min-width:0}}
.full{{grid-column:1/-1}}
@media (min-width:1081px){{.alone{{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);column-gap:60px;
align-content:start}}.alone>*{{grid-column:1}}.alone>details{{grid-column:2;grid-row:1/span 6;margin:0}}}}
h2{{font-size:17px;font-weight:650;margin:0 0 4px}}
.says{{margin:0 0 8px;color:var(--soft);font-size:13.5px;max-width:115ch}}
.notes{{margin:10px 0 0;padding-left:18px;font-size:13.5px;max-width:125ch}}
.keys{{margin:2px 0 10px;font-size:13.5px}}
.key{{display:inline-flex;align-items:center;margin:0 18px 2px 0;gap:7px;white-space:nowrap}}
.key+.key{{margin-left:0}}
.swatch{{width:auto;height:14px;flex:none}}
.card svg:not(.swatch){{display:block;width:100%;height:auto;margin-top:8px;overflow:visible}}
.slim{{display:none}}
.panels{{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:10px 34px}}
.scroll{{overflow-x:auto;overscroll-behavior-x:contain}}
.timelines .scroll svg:not(.swatch){{min-width:1180px;overflow:hidden}}
.timelines>*+*{{margin-top:14px}}
table{{border-collapse:collapse;font-size:13.5px;width:100%}}
caption{{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}}
th,td{{text-align:right;padding:6px 0 6px 16px;white-space:nowrap;font-weight:400}}
thead th{{color:var(--soft);font-size:12.5px;vertical-align:bottom;white-space:normal;min-width:62px;line-height:1.3;
border-bottom:1px solid var(--axis)}}
tbody th{{text-align:left;padding-left:0;font-weight:600;position:sticky;left:0;background:var(--card)}}
thead th:first-child{{text-align:left;padding-left:0;position:sticky;left:0;background:var(--card)}}
tbody tr+tr>*{{border-top:1px solid var(--edge)}}
.bounds>*{{color:var(--soft)}}
tbody .bounds th{{font-weight:400;font-style:italic}}
tbody .bounds+tr:not(.bounds)>*{{border-top:1px solid var(--axis)}}
details{{margin-top:12px;font-size:13.5px}}
summary{{cursor:pointer;color:var(--soft);width:max-content}}
summary:hover{{color:var(--ink)}}
details[open] summary{{margin-bottom:6px}}
svg text{{fill:var(--ink);font-size:12px}}
.axes text{{fill:var(--soft);font-size:11.5px}}
svg text.name{{fill:var(--soft);font-size:12px}}
.grid{{stroke:var(--grid);fill:none}}
.axis{{stroke:var(--axis);fill:none}}
.bound{{stroke:var(--ink);stroke-width:1.6;fill:none}}
{_SERIES}
.line{{stroke:var(--own);stroke-width:2.2;fill:none;stroke-linejoin:round}}
.thin{{stroke-width:1.5}}
.area{{fill:var(--own);fill-opacity:.16}}
.dot{{fill:var(--own)}}
.mark{{fill:var(--own);stroke:var(--card);stroke-width:1}}
.fill{{fill:var(--own)}}
.again{{fill:var(--own);fill-opacity:.22;stroke:var(--own);stroke-width:1.5}}
svg text.label{{fill:var(--own);font-weight:600;font-size:12.5px}}
.halo{{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}}
.lane{{fill:var(--lane)}}
{_ADAPTERS}
.stays text{{fill:var(--on);font-size:10.5px;pointer-events:none}}
.stays.focus rect{{opacity:.22}}
.stays.focus text{{opacity:.35}}
.stays.focus rect.same{{opacity:1;stroke:var(--ink);stroke-width:1.2}}
.answered{{fill:var(--answered)}}
.failed{{fill:var(--failed)}}
.refused{{fill:url(#hatch)}}
.expired{{fill:url(#dots)}}
.cancelled{{fill:url(#bars)}}
.arrivals{{fill:none;stroke:var(--ink);stroke-width:1.3}}
.defs{{position:absolute;width:0;height:0}}
#hatch path{{stroke:var(--refused);stroke-width:3.4;fill:none}}
#bars path{{stroke:var(--cancelled);stroke-width:2.4;fill:none}}
#dots rect{{fill:var(--expired);fill-opacity:.35}}
#dots circle{{fill:var(--expired)}}
@media (max-width:1080px){{main{{grid-template-columns:minmax(0,1fr)}}}}
@media (max-width:620px){{
body{{font-size:14.5px}}
header,main{{padding-left:14px;padding-right:14px}}
.card{{padding:14px 14px 12px;border-radius:8px}}
.lead{{font-size:16px}}
.broad{{display:none}}
.slim{{display:block}}
.facts{{display:grid;grid-template-columns:1fr 1fr;gap:10px 18px}}
.panels{{grid-template-columns:minmax(0,1fr)}}
}}
@media print{{body{{background:#fff}}button{{display:none}}.card{{break-inside:avoid}}}}
"""

SCRIPT = """
(function () {
  var root = document.documentElement, button = document.getElementById("theme");
  var dark = matchMedia("(prefers-color-scheme: dark)");
  function isDark() { return root.dataset.theme ? root.dataset.theme === "dark" : dark.matches; }
  function name() { button.textContent = isDark() ? "Light" : "Dark"; }
  button.addEventListener("click", function () { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
  dark.addEventListener("change", name);
  button.hidden = false;
  name();
  document.querySelectorAll(".stays").forEach(function (stays) {
    stays.addEventListener("pointerover", function (event) {
      var adapter = event.target.dataset.a;
      if (adapter === undefined) return;
      stays.classList.add("focus");
      stays.querySelectorAll("rect").forEach(function (rect) {
        rect.classList.toggle("same", rect.dataset.a === adapter);
      });
    });
    stays.addEventListener("pointerleave", function () { stays.classList.remove("focus"); });
  });
})();
"""


def _pattern(name: str, *parts: str, size: int = 6, turned: str | None = None) -> Markup:
    return element(
        "pattern", *parts, id=name, width=size, height=size, patternUnits="userSpaceOnUse", patternTransform=turned
    )


PATTERNS = element(
    "svg",
    element(
        "defs",
        _pattern("hatch", element("path", d="M0 3H6"), turned="rotate(45)"),
        _pattern("bars", element("path", d="M0 2H4"), size=4),
        _pattern("dots", element("rect", width=5, height=5), element("circle", cx=2.5, cy=2.5, r=1.3), size=5),
    ),
    class_="defs",
    aria_hidden="true",
)
"""What endings are filled with, so that they are told apart without colours."""
