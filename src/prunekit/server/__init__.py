"""The server behind `serve`: what requests may ask, who waits for whom, routes, and how it ends. Needs `prunekit[serve]`."""
