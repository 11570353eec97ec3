"""gRPC: servers and clients of the two services, status codes, socket counters.

The only room that imports grpc. Moves frames as bytes and never looks inside.
"""
