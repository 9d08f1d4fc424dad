"""`python -m w2c_tui.cli` is `w2c`."""

from w2c_tui.cli import main

main()
