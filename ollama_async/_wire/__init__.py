"""The bytes of an exchange: sockets, connections, HTTP/1.1. Nothing in here knows Ollama."""
