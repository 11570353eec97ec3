"""Links that carry transfers, and gRPC: servers and clients of the two services, status codes, socket counters.

The only room that imports grpc, and not in what its agents use: `api`, `link`, `address`, `handle`, `sockets`.
Moves frames as bytes; what a link hands out of a pull was checked as a receiver checks it.
"""
