"""The process that owns one backend and its model, and the client that talks to it."""
