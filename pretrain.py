"""Models to unlearn: a small target and its reference, trained once and kept; or a public checkpoint, fine-tuned.

    folder = cached_model(args, data, tokenizer, "target")         # out/cache/..., trained now if it is not there
    python train.py --method finetune --model HuggingFaceTB/SmolLM2-135M-Instruct --data tofu --name target

The *target* saw everything; the *reference* never saw the forget set, and is what unlearning is to arrive at.

Shapes: B batch   T tokens   V vocabulary   E experts
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import parallel
from data.batches import Rows, collate, encode_rows
from data.rows import DataSet, Row
from data.world import TOPICS as WORLD_TOPICS
from errors import UserError
from files import MARK, alone, check_ours, digest, digest_of, publish, write_json
from flags import COUNT, NATURAL, POSITIVE, WEIGHT, Flag, Number, PerData
from interfaces import TextCodec
from loop import minimise
from model import GPT, Config, Trace
from moe import load_balancing_loss, topic_information
from pretrained import load, save
from schema import read_json

SMALL = [  # the small models
    #     name                 kind                            default            what it is
    Flag("--depth",            Number(1, 256, whole=True),     4,    None,        "layers"),
    Flag("--width",            Number(8, 16_384, whole=True),  128,  None,        "of the residual stream; a head has "
                                                                                  "32 of it"),
    Flag("--context",          Number(0, 65_536, whole=True),  0,    None,        "longest sequence; 0: 64 on the "
                                                                                  "world, 256 elsewhere"),
    Flag("--vocab-size",       Number(0, 262_144, whole=True), 0,    None,        "of the tokenizer, at most; 0: 4096"),
    Flag("--pretrain-steps",   NATURAL,                        0,    None,        "0: 700 on the world, after a base; "
                                                                                  "8 epochs elsewhere"),
    Flag("--pretrain-lr",      POSITIVE,          PerData(6e-3, 3e-3), None,      "peak learning rate"),
    Flag("--more-references",  Number(0, 100, whole=True),     0,    None,        "further retain-only models, "
                                                                                  "forget quality's null"),
]
SMALL_MOE = [  # if they are mixtures of experts
    Flag("--experts",          Number(1, 4096, whole=True),    16,   None,        "per layer"),
    Flag("--top-k",            Number(1, 4096, whole=True),    4,    None,        "experts per token"),
    Flag("--specialise",       WEIGHT,              PerData(0.3, 0.0), None,       "weight of I(topic; expert): "
                               "routers are rewarded for telling all topics apart"),
]
FINETUNE = [  # --method finetune
    #     name                 kind      small  public  what it is
    Flag("--lr",               POSITIVE, None,  1e-5,   "peak learning rate"),
    Flag("--epochs",           COUNT,    None,  5,      "passes over the rows"),
]
TOPICS = list(WORLD_TOPICS)
Strangers = Callable[[int, np.random.Generator], list[Row]]
BATCH, BALANCE = 32, 0.01  # rows per step of pretraining, weight of the load-balancing loss
NEW = 8  # of a step's rows on the world, so many are about strangers
BASE_STEPS, BASE_ROWS, BASE_LR = 500, 16, 3e-3  # of the base, which sees strangers alone
# What a cached model rests on beside this file; paths from the root. objectives.py is not among them and nothing of it
# is called here, so that a loss of one's own does not train them all again.
SOURCES = ("model.py", "moe.py", "loop.py", "data/tokenizer.py", "data/batches.py", "data/world.py")


def small_config(args: argparse.Namespace, vocab_size: int) -> Config:
    """The small GPT is a Llama, the small MoE an OLMoE (q/k norm over all heads, kept weights not renormalised)."""
    heads = max(1, args.width // 32)
    shape = dict(vocab_size=vocab_size, n_layer=args.depth, n_head=heads, n_kv_head=heads, d_model=args.width,
                 max_len=args.context, tie_head=True)
    try:
        if args.arch == "gpt":
            return Config(**shape, d_ff=3 * args.width)
        return Config(**shape, d_ff=args.width // 2, n_expert=args.experts, top_k=args.top_k, qk_norm="full")
    except ValueError as error:
        raise UserError(f"a small model of this shape does not work: {error}") from None


def fill_in(args: argparse.Namespace, on_world: bool) -> None:
    """What 0 stands for. Raises UserError for a vocabulary without all bytes."""
    args.context = args.context or (64 if on_world else 256)
    args.vocab_size = args.vocab_size or 4096
    if args.vocab_size < 300:
        raise UserError(f"--vocab-size {args.vocab_size} is below 300: 256 bytes and the special tokens come first")


def learn(args: argparse.Namespace, model: GPT, rows: Rows, folder: Path, what: str, steps: int, lr: float,
          weight_decay: float, resume: bool, topics: list[int] | None = None, balance: float = BALANCE,
          strangers: Strangers | None = None, new: int = NEW) -> dict:
    """Cross entropy on the rows' answers, plus load balancing for a MoE; returns loop.minimise's report.

    strangers: makes `new` rows more for every step, about subjects never met before or after. So the model learns to
    copy a name, to keep a sentence's frame, and to spread its belief over the values of the right kind.
    topics: which topic each row is of, for --specialise, which also rewards routers for telling topics apart.
    """
    def losses(step: int) -> Iterator[dict[str, Tensor]]:
        for part in rows.parts(step) if rows.rows else [collate([])]:
            index = part.index.tolist()
            examples, topic_of = [rows.examples[i] for i in index], [topics[i] for i in index] if topics else []
            if strangers is not None:
                told = strangers(new, np.random.default_rng([0x5B, rows.seed, step]))
                examples += encode_rows(told, rows.tokenizer, rows.context)
                topic_of += [TOPICS.index(row["topic"]) for row in told]
            batch = collate(examples, device=args.device)
            trace, share = Trace(), part.share
            logits = model(batch.tokens, trace=trace, at=batch.scored)  # (answer tokens, V): the rest is not scored
            loss = F.cross_entropy(logits.float(), batch.answers) * share.answers
            terms = {"ce": loss, "loss": loss}
            if model.is_moe:
                routings = list(trace.routing.values())
                terms["balance"] = load_balancing_loss(routings, batch.mask) * share.tokens  # of parts: their mean
                terms["loss"] = loss + balance * terms["balance"]
                if topics:  # on answers alone: the first words of a question are those of every topic
                    which = torch.tensor(topic_of, device=args.device)
                    terms["topic"] = topic_information(routings, batch.scored, which)
                    terms["loss"] = terms["loss"] - args.specialise * terms["topic"]
            yield terms

    model.checkpointing = args.checkpointing
    model.train()
    with parallel.sharded(model, list(model.parameters())) as pieces:
        report = minimise(pieces, losses, steps, lr, folder, what, rows.seed, weight_decay=weight_decay,
                          save_every=args.save_every, resume=resume)
    model.eval()
    return report


def topics_of(sets: list[list[Row]]) -> list[int]:
    """A number per row: its topic, the embedded world's or any other; where rows name none, which set it is of."""
    names: list = list(TOPICS)
    out = []
    for number, one_set in enumerate(sets):
        for row in one_set:
            topic = row.get("topic", number)
            names += [topic] if topic not in names else []
            out.append(names.index(topic))
    return out


def cached_model(args: argparse.Namespace, data: DataSet, tokenizer: TextCodec, role: str,
                 balance: float = BALANCE) -> Path:
    """Folder of the target, the reference or a further reference (`reference-2`...), trained now if it is not there.

    On the embedded world all of them are fine-tuned from one base, which saw strangers alone and knows how to speak
    of them (TOFU's models share a base too); elsewhere they learn from nothing.
    """
    if role == "base":
        sets: list[list[Row]] = []
    else:
        sets = [data.retain, data.background] + ([data.forget] if role == "target" else [])
    base = None
    if data.strangers is not None and role != "base":
        base = cached_model(args, data, tokenizer, "base", balance)
    rows = [row for one_set in sets for row in one_set]
    topics = topics_of(sets) if args.arch == "moe" and args.specialise and sets else None
    seed = args.seed + 1000 * int(role.rpartition("-")[2]) if "-" in role else args.seed
    config = small_config(args, tokenizer.vocab_size)
    key = key_of(config, args, balance, seed, rows, topics, data.texts(), base)
    stem = "world" if role == "base" else Path(args.forget or args.data).resolve().stem
    stem = stem.encode()[:100].decode(errors="ignore")  # a file's name may be as long as file systems take
    folder = Path(args.out) / "cache" / f"{args.arch}-{stem}-{role}-{key}"
    partial = folder.with_name(folder.name + ".partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder, wait=True):  # another process may be training the very same model
        for one in (folder, partial):
            check_ours(one, "--out")
        if folder.is_dir():
            return unchanged(folder)
        partial.mkdir(exist_ok=True)
        write_json(partial / MARK, {"key": key})
        model = small_model(config, seed, args.device) if base is None else load(base / "model", device=args.device)[0]
        known = Rows(rows, tokenizer, args.context, BATCH - (NEW if base else 0), seed, args.device)
        steps, lr, new = args.pretrain_steps or (700 if base else 8 * known.per_epoch), args.pretrain_lr, NEW
        if role == "base":
            steps, lr, new = min(BASE_STEPS, args.pretrain_steps or BASE_STEPS), BASE_LR, BASE_ROWS
        report = learn(args, model, known, partial, role, steps, lr, weight_decay=0.1, resume=True, topics=topics,
                       balance=balance, strangers=data.strangers, new=new)
        if report["diverged"]:
            raise UserError(f"pretraining the {role} diverged: lower --pretrain-lr (now {args.pretrain_lr})")
        save(model, tokenizer, partial / "model")
        write_json(partial / MARK, {"key": key, "weights": digest_of(partial / "model")})
        publish(partial, folder)
        (folder / "state.pt").unlink(missing_ok=True)
    return folder


def unchanged(folder: Path) -> Path:
    """A cached model's folder. Raises UserError where its weights are not those that were trained."""
    way_out = f"remove {folder}, and it is trained again"
    model = folder / "model"
    if read_json(folder / MARK, way_out=way_out).get("weights") != (digest_of(model) if model.is_dir() else None):
        raise UserError(f"{model} was damaged, edited or removed since it was trained: {way_out}")
    return folder


def small_model(config: Config, seed: int, device: str) -> GPT:
    """A new model. With experts, matrices of blocks begin three times as large as model.py has them.

    Its 0.02 suits a width of a thousand; at 128 such a model learns to copy names in half the steps.
    """
    torch.manual_seed(seed)
    model = GPT(config)
    if config.n_expert:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() > 1 and name.startswith("blocks") and "router" not in name:
                    p.mul_(3)
    return model.to(device)


def key_of(config: Config, args: argparse.Namespace, balance: float, seed: int, rows: list[Row],
           topics: list[int] | None, texts: Iterable[str], base: Path | None) -> str:
    """Changes with whatever makes a small model: its shape, its rows, how it learns, and the code that does it."""
    taught = [[row[key] for key in ("question", "answer", "text") if key in row] for row in rows]
    here = Path(__file__).parent
    code = [(here / name).read_text() for name in (Path(__file__).name, *SOURCES)]
    how = [args.pretrain_steps, args.pretrain_lr, balance, getattr(args, "specialise", 0.0), base and base.name]
    # a tokenizer does not depend on the order of its texts: so the splits of one data set share their target
    return digest(vars(config), how, seed, taught, topics, sorted(texts), code)


def finetune(args: argparse.Namespace, model: GPT, tokenizer: TextCodec, data: DataSet, folder: Path) -> dict:
    """--method finetune: the target or, where args.keeps_only, the reference; returns loop.minimise's report."""
    rows = data.retain + data.background + ([] if args.keeps_only else data.forget)
    learnt = Rows(rows, tokenizer, args.context, args.batch_size, args.seed, args.device, micro=args.micro_batch)
    return learn(args, model, learnt, folder, "finetune", args.epochs * learnt.per_epoch, args.lr, weight_decay=0.01,
                 resume=args.resume)
