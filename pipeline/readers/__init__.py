"""One file a format. Every reader counts rows, and yields rows [start, stop) in bounded memory."""
