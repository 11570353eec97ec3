"""The ten lines: one process stands for both agents; the message is what would travel."""

import kvlink

text = "Jand Faris was born in Nibo. Rom Tecil was born in Naklo. Jand Faris plays the cello every evening."
question = "What instrument does Jand Faris play?"

sender, receiver = kvlink.Sender(), kvlink.Receiver()
context = sender.read(text)
message = kvlink.pack(sender, context, question, "int8")
held = kvlink.unpack(receiver, message)
print(receiver.answer(held, question).text)
print(f"{len(message):,} bytes, {held.receipt.bits_per_element:.2f} bits per element")
