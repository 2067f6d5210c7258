"""Records: the one shape of every task's data, whatever format it is written in."""
