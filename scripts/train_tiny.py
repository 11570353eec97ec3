"""Train `kvlink-tiny`, the model that ships with the package, on generated passages.

    python scripts/train_tiny.py --out kvlink/model/tiny --seed 0

What is trained: a Qwen2 decoder (GQA, RoPE, biased q/k/v) that answers questions from a
passage. The loss is cross-entropy on the answers, a light language-model loss on the rest, and,
while the model is young, an attention loss: the generator knows where each answer stands, so one
head of the last layer is told to look there and one head of the second layer is told to look
at the entity. The attention loss is gone well before training ends.

Weights are kept in float32 for the optimizer and in bfloat16 for the arithmetic, which is how
they ship. Hidden matrices are trained by Muon, the rest by AdamW.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from kvlink.eval.passages import Passage, make_passage

PAD_ID, EOS_ID = 0, 1
BEFORE, AFTER, ASK, ANSWER = "Context: ", "\n", "Question:", "\nAnswer:"
CONFIG = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 640,
    "max_position_embeddings": 2048,
}
BIND_LAYER, FIND_LAYER = 1, 3


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE over generated passages; digits stand alone."""
    rng = random.Random(1)

    def corpus():
        for _ in range(6000):
            passage = make_passage(rng, 14, novel_share=0.1)
            yield BEFORE + passage.text + AFTER
            yield "\n".join(f"{ASK} {q.text}{ANSWER} {q.answer}" for q in passage.questions)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


_TOKENIZER: Tokenizer


@lru_cache(maxsize=400_000)
def encode(text: str) -> tuple[int, ...]:
    return tuple(_TOKENIZER.encode(text).ids)


@dataclass
class Sample:
    """One passage with its questions as tokens, and what attends to what."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)
    bind: list[tuple[int, int, int]] = field(default_factory=list)
    """(from position, first target, one past the last target): look at the entity."""
    find: list[tuple[int, int, int]] = field(default_factory=list)
    """(from position, first target, one past the last target): look at the answer."""

    def add(self, text: str) -> tuple[int, int]:
        start = len(self.ids)
        self.ids += encode(text)
        self.labels += [-100] * (len(self.ids) - start)
        return start, len(self.ids)


def encode_sample(passage: Passage, questions: int, rng: random.Random) -> Sample:
    out = Sample()
    first = passage.pieces[0]
    # The first piece joins the prefix's space, so that pieces cut the text where words begin.
    out.add(BEFORE.rstrip(" "))
    entity_at, value_at = {}, {}
    for number, piece in enumerate(passage.pieces):
        if piece.role == "entity" or piece.text[1:2].isupper():  # a sentence begins
            out.breaks.append(len(out.ids))
        span = out.add(" " + first.text if number == 0 else piece.text)
        if piece.role == "entity":
            entity_at[piece.fact] = span
        if piece.role == "value":
            value_at[piece.fact] = span
            out.bind += [(at, *entity_at[piece.fact]) for at in range(*span)]
    out.add(AFTER)
    for question in passage.questions[:questions]:
        text = rng.choice((question.text, *question.paraphrases))
        before, after = text.split(question.entity)
        out.breaks.append(len(out.ids))
        out.add(f"{ASK} {before}".rstrip(" "))
        entity = out.add(" " + question.entity)
        out.add(after)
        out.add(ANSWER)
        answer = (*encode(" " + question.answer), EOS_ID)
        for step, token in enumerate(answer):
            at = len(out.ids) - 1
            if step < len(answer) - 1:
                out.bind.append((at, *entity))
                if question.answerable:
                    target = value_at[question.fact][0] + step
                    out.find.append((at, target, target + 1))
                elif step == 0:
                    out.find.append((at, 0, 1))
            out.ids.append(token)
            out.labels.append(token)
    return out


@dataclass
class Batch:
    ids: Tensor
    labels: Tensor
    positions: Tensor
    bind: Tensor
    find: Tensor

    def to(self, device: str) -> Batch:
        return Batch(*(getattr(self, n).to(device) for n in ("ids", "labels", "positions", "bind", "find")))


def make_batch(seed: str, tokens: int, facts: float, novel_share: float, stretch: float) -> Batch:
    """Samples of similar length, padded. `stretch`: chance that a sample's positions have gaps."""
    rng = random.Random(seed)
    centre = facts * rng.uniform(0.4, 1.15)
    samples: list[Sample] = []
    longest = 0
    while True:
        filler = rng.uniform(0.0, 0.5)
        passage = make_passage(
            rng, max(2, round(centre * rng.uniform(0.9, 1.1))), filler_share=filler, novel_share=novel_share
        )
        sample = encode_sample(passage, 12, rng)
        if samples and max(longest, len(sample.ids)) * (len(samples) + 1) > tokens:
            break
        samples.append(sample)
        longest = max(longest, len(sample.ids))
    ids = torch.full((len(samples), longest), PAD_ID)
    labels = torch.full((len(samples), longest), -100)
    positions = torch.zeros((len(samples), longest), dtype=torch.long)
    spans: dict[str, list] = {"bind": [], "find": []}
    for row, sample in enumerate(samples):
        count = len(sample.ids)
        ids[row, :count] = torch.tensor(sample.ids)
        labels[row, :count] = torch.tensor(sample.labels)
        gaps = torch.ones(longest, dtype=torch.long)
        gaps[0] = 0
        if rng.random() < stretch:
            room = max(0, 1100 - count) * rng.random()
            for at in sample.breaks:
                gaps[at] += round(rng.random() * 2 * room / len(sample.breaks))
        positions[row] = gaps.cumsum(0)
        for kind in spans:
            spans[kind] += [(row, *span) for span in getattr(sample, kind)]
    return Batch(ids, labels, positions, torch.tensor(spans["bind"]), torch.tensor(spans["find"]))


class AttentionLoss:
    """-log of the attention mass that a head puts where it should, from captured q and k."""

    def __init__(self, model: Qwen2ForCausalLM) -> None:
        self._seen: dict[tuple[int, str], Tensor] = {}
        self._model = model
        for index in (BIND_LAYER, FIND_LAYER):
            attention = model.model.layers[index].self_attn
            for name in ("q_proj", "k_proj"):
                getattr(attention, name).register_forward_hook(self._keep(index, name))

    def _keep(self, index: int, name: str):
        def hook(module, inputs, output):
            self._seen[index, name] = output

        return hook

    def __call__(self, layer: int, head: int, spans: Tensor, positions: Tensor) -> Tensor:
        config = self._model.config
        size = config.hidden_size // config.num_attention_heads
        group = config.num_attention_heads // config.num_key_value_heads
        q = self._seen[layer, "q_proj"].unflatten(-1, (-1, size))[:, :, head]
        k = self._seen[layer, "k_proj"].unflatten(-1, (-1, size))[:, :, head // group]
        cos, sin = self._model.model.rotary_emb(q, positions)
        q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=0)
        q, k = q[0], k[0]
        losses = []
        for row in range(q.shape[0]):
            mine = spans[spans[:, 0] == row]
            scores = (q[row, mine[:, 1]] @ k[row].T).float() / math.sqrt(size)
            column = torch.arange(k.shape[1], device=q.device)
            logp = scores.masked_fill(column > mine[:, 1:2], -torch.inf).log_softmax(-1)
            inside = (column >= mine[:, 2:3]) & (column < mine[:, 3:4])
            losses.append(-logp.masked_fill(~inside, -torch.inf).logsumexp(-1))
        return torch.cat(losses).mean()


class Trainer:
    """bfloat16 weights for the arithmetic, float32 weights for Muon and AdamW."""

    def __init__(self, model: Qwen2ForCausalLM, muon_lr: float, adam_lr: float) -> None:
        self.named = dict(model.named_parameters())
        self.master = {n: p.detach().clone().float().requires_grad_() for n, p in self.named.items()}
        hidden = [n for n, p in self.named.items() if p.ndim == 2 and "embed" not in n]
        other = [n for n in self.named if n not in hidden]
        self.optimizers = [
            torch.optim.Muon(
                [self.master[n] for n in hidden],
                lr=muon_lr,
                momentum=0.95,
                weight_decay=0.02,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                [self.master[n] for n in other], lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0
            ),
        ]
        self._lr = [muon_lr, adam_lr]
        model.to(torch.bfloat16)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        for name, parameter in self.named.items():
            self.master[name].grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(list(self.master.values()), 1.0)
        for optimizer, lr in zip(self.optimizers, self._lr, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
        for name, parameter in self.named.items():
            parameter.copy_(self.master[name])


def use_tokenizer(tokenizer: Tokenizer) -> None:
    """The tokenizer that `encode` cuts with."""
    global _TOKENIZER
    _TOKENIZER = tokenizer


@torch.no_grad()
def initialize(model: Qwen2ForCausalLM) -> None:
    """Start as a model that only knows its own tokens.

    The stock initialization drowns the embedding (std 0.02) in the first layers' noise (std 0.3),
    and copying a name from the context is not learned for a long time.
    """
    model.model.embed_tokens.weight.normal_(0.0, 0.4)
    model.model.norm.weight.fill_(0.15)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def save(model: Qwen2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=CONFIG["max_position_embeddings"],
    ).save_pretrained(folder)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=4000, help="tokens per step")
    parser.add_argument("--vocab", type=int, default=3072)
    parser.add_argument("--muon-lr", type=float, default=5e-3)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--facts", type=float, nargs=2, default=(6.0, 44.0), help="facts at first, at last")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--start", type=Path, help="go on from these weights instead of new ones")
    parser.add_argument("--attention-until", type=float, default=0.6, help="share of steps; 0: never")
    return parser.parse_args()


def build_model(vocab: int, start: Path | None, device: str) -> Qwen2ForCausalLM:
    """A new model, or one with the weights of `start`, in float32."""
    config = Qwen2Config(
        vocab_size=vocab, tie_word_embeddings=True, pad_token_id=PAD_ID, eos_token_id=EOS_ID,
        bos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **CONFIG,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(device)
    initialize(model)
    if start:
        model.load_state_dict(Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict())
    print(f"parameters {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M", flush=True)
    return model


def guidance(attention_loss: AttentionLoss, batch: Batch) -> tuple[Tensor, Tensor]:
    """The attention losses: bind (look at the entity's name) and find (look at the answer)."""
    # One head looks at the first token of the entity's name, one at the last.
    first, last = batch.bind.clone(), batch.bind.clone()
    first[:, 3], last[:, 2] = first[:, 2] + 1, last[:, 3] - 1
    bind = attention_loss(BIND_LAYER, 0, first, batch.positions)
    bind = (bind + attention_loss(BIND_LAYER, 1, last, batch.positions)) / 2
    heads = range(CONFIG["num_attention_heads"])
    find = [attention_loss(FIND_LAYER, head, batch.find, batch.positions) for head in heads]
    return bind, torch.stack(find).mean()


def take_step(
    model: Qwen2ForCausalLM, batch: Batch, attention_loss: AttentionLoss, progress: float, weight: float
) -> dict[str, float]:
    """Forward and backward of one batch; returns losses and accuracies by name."""
    states = model.model(batch.ids, position_ids=batch.positions, use_cache=False).last_hidden_state[:, :-1]
    target, answers = batch.ids[:, 1:], batch.labels[:, 1:] >= 0
    logits = model.lm_head(states[answers]).float()
    answer_loss = F.cross_entropy(logits, target[answers])
    rest = (target != PAD_ID) & ~answers & (torch.rand(target.shape, device=target.device) < 0.15)
    lm_loss = F.cross_entropy(model.lm_head(states[rest]).float(), target[rest])
    loss = answer_loss + (0.3 if progress < 0.3 else 0.1) * lm_loss
    told = {"loss": answer_loss.item(), "lm": lm_loss.item()}
    if weight:
        bind, find = guidance(attention_loss, batch)
        loss = loss + weight * (bind + find)
        told |= {"bind": bind.item(), "find": find.item()}
    loss.backward()
    right = (logits.argmax(-1) == target[answers]).float()
    content = target[answers] != EOS_ID
    return {**told, "right": right.mean().item(), "content": right[content].mean().item()}


def main() -> None:
    args = read_arguments()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.vocab)
    use_tokenizer(tokenizer)
    model = build_model(args.vocab, args.start, args.device)
    attention_loss, trainer = AttentionLoss(model), Trainer(model, args.muon_lr, args.adam_lr)
    log: dict[str, float] = defaultdict(float)
    began = time.time()
    for step in range(args.steps):
        progress = step / args.steps
        facts = args.facts[0] + (args.facts[1] - args.facts[0]) * min(1.0, progress / 0.5)
        novel_share = 0.0 if progress < 0.1 and not args.start else 0.2
        batch = make_batch(f"{args.seed}/{step}", args.tokens, facts, novel_share, 0.3).to(args.device)
        weight = 0.5 * max(0.0, 1 - progress / args.attention_until) if args.attention_until else 0.0
        for name, value in take_step(model, batch, attention_loss, progress, weight).items():
            log[name] += value / 50
        warm, rate = min(1, (step + 1) / 100), min(1.0, (1 - progress) / 0.5)
        trainer.step(warm * max(rate, 0.02))
        if step % 50 == 49:
            means = " ".join(f"{name} {value:.3f}" for name, value in log.items())
            print(f"{step + 1} {means} facts {facts:.1f} {time.time() - began:.0f}s", flush=True)
            log.clear()
        if step % 500 == 499:
            save(model, tokenizer, args.out)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
