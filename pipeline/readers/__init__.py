"""One file a format. Every reader counts rows and yields rows [start, stop) in order and in bounded memory."""
