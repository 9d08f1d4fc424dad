"""Untrusted input: docs/security.md says what is untrusted, what holds it and which test proves it.

Here are the tests that go through whole commands, or that belong to no single module.
"""
