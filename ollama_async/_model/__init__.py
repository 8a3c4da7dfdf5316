"""What goes to the server and comes from it, as values: no I/O, no asyncio."""
