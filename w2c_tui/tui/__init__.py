"""The full-screen application.

Owns what is seen and typed. Knows models only through `engine.client`, and never imports a
backend, torch or transformers: they live in the engine process.
"""
