"""Two agents over the network: `kvlink sender` and `kvlink receiver` run, and this asks them."""

import asyncio

import kvlink

SENDER, RECEIVER = "127.0.0.1:50051", "127.0.0.1:50052"
text = "Jand Faris was born in Nibo. Rom Tecil was born in Naklo. Jand Faris plays the cello every evening."
question = "What instrument does Jand Faris play?"


async def ask() -> None:
    async with kvlink.SenderClient(SENDER) as sender, kvlink.ReceiverClient(RECEIVER) as receiver:
        async for progress in sender.deliver(kvlink.Delivery(RECEIVER, question, text=text)):
            receipt = progress.receipt  # complete with the last one
        print(f"{receipt.wire_bytes:,} bytes as {receipt.recipe.split()[1]}")
        pieces = [piece.text async for piece in receiver.generate(kvlink.Ask(progress.cache_id, question))]
        print("".join(pieces).strip())


asyncio.run(ask())
