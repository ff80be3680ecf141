"""Where engines are: what names the members of a pool that nobody has listed one by one."""
