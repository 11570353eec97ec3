"""Both ends in plain transformers code: one reads a passage, the other answers questions about it."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import kvlink
from kvlink.model.loading import embedded_folder

MODEL = embedded_folder()  # or the name of any decoder-only model
PASSAGE = (
    "Jand Faris was born in Nibo. Rom Tecil was born in Naklo. The harbour lay quiet when the first boats came in. "
    "Jand Faris plays the cello every evening. Rom Tecil learned the flute from a neighbour. Mira Dosh was born in "
    "Tavik, a day's walk up the coast."
)
QUESTIONS = (
    "What instrument does Jand Faris play?",
    "Where was Rom Tecil born?",
    "Where was Mira Dosh born?",
)


def loaded() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto"), AutoTokenizer.from_pretrained(MODEL)


def read(file: Path, recipe: str) -> None:
    """One agent: read the passage with transformers, then pack what was read."""
    model, tokenizer = loaded()
    ids = tokenizer(f"Context: {PASSAGE}\n", return_tensors="pt")["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    sender = kvlink.Sender(model, tokenizer)
    context = sender.adopt(cache, ids)
    with file.open("wb") as out:
        size = sender.pack(context, QUESTIONS[0], recipe).write(out)
    print(f"{recipe}: {ids.shape[1]} tokens in {size:,} bytes")


def answer(file: Path) -> None:
    """The other agent: restore the cache, then generate with transformers, as often as there are questions."""
    model, tokenizer = loaded()
    receiver = kvlink.Receiver(model, tokenizer)
    with file.open("rb") as source:
        held = receiver.read_file(source)
    for question in QUESTIONS:
        inputs = receiver.generate_inputs(held, question)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        tokens = output[0, inputs["input_ids"].shape[1] :]
        print(f"  {question} {tokenizer.decode(tokens, skip_special_tokens=True).strip()}")


with tempfile.TemporaryDirectory() as folder:
    for recipe in ("raw", "auto", "q2c+draft@0.5 transform=1"):
        read(Path(folder) / "passage.kvl", recipe)
        answer(Path(folder) / "passage.kvl")
