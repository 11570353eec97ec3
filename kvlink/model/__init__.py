"""Language models: load, prefill, capture evidence, restore a cache, generate.

The only room that knows transformers. Sees no recipe's bytes, no frame, no peer.
"""
