"""The wire format: frames, sessions and `.kvl` files, without sockets, clocks or tensors.

`messages` is the one place where protobuf and Python values meet; `session` holds the state
machine; `file` keeps a transfer in a file.
"""
