"""Pages made for training: composed from layouts, themes and words, and rendered in a browser.

`compose` makes a page from a seed, `hints` what text recognition would say of it, `write` a data
set of many; `real` takes sections of published templates apart, for validation. None of it knows
anything about models or tokenizers.
"""
