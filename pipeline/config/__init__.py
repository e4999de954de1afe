"""Every setting with its default, range and unit; YAML and `section.key=value` in, a frozen Config out.

Instant: no torch. `settings` lists them, `loading` reads them, `validation` refuses what cannot be.
"""
