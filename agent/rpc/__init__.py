"""Remote procedure calls: sockets, HTTP/2, and the dispatch of methods to services."""
