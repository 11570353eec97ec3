"""Selection and compression of a context cache: select → low rank → quantize → code.

`codec` is the only place where the steps meet.
"""
