"""The whole story: pretrain a small model or open a public one, unlearn part of what it learnt, score it.

    python train.py --method uoe                      # small MoE, one expert unlearned      (uoe.py)
    python train.py --method uld                      # small GPT, assistant and difference  (uld.py)
    python train.py --method full --forget-loss ga    # all weights, the usual way, on either: --arch gpt | moe
    python train.py --method uld --data tofu --split forget10

    python train.py --method finetune --model HuggingFaceTB/SmolLM2-135M-Instruct --data tofu --name target
    python train.py --method finetune --model ... --data tofu --split retain90 --name reference
    python train.py --method uld --model out/target --reference out/reference --data tofu
    python train.py --method upcycle --model DIR --experts 8 --top-k 2      # dense -> mixture of experts, for UOE

A method is three independent choices: what trains (--method), what it forgets by (--forget-loss), what it keeps by
(--retain-loss); unlearn.py has the tables, options.py every flag. Without --model, target (saw everything) and
reference (never saw the forget set) are trained once and kept in out/cache, keyed by what made them. A run is a
folder out/<name>: config.json, model/ or assistant/, log.jsonl, metrics.json, figures/. It is written under
<name>.partial and renamed when whole; --resume goes on with a run that was cut off, and on CPU ends with the very
same bits.
"""

import argparse
import copy
import fcntl
import hashlib
import inspect
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import objectives
import uoe
from data.batches import encode_rows, in_order, is_cut
from data.hub_tokenizer import NoTokenizer
from data.rows import DataSet, Row
from data.tokenizer import Tokenizer
from errors import UserError, one_line_errors
from eval import Scores, evaluate, finish_report, routing_overlap, scores_of, summarise
from loop import collate_at, fit
from model import GPT, Config, Trace
from moe import load_balancing_loss, topic_information
from options import parse
from pretrained import find_folder, load, load_tokenizer, read_config, save
from runs import RunFolder, data_of, forget_batches, open_run, revision, weights_of
from tables import compare
from unlearn import unlearn
from upcycling import upcycle

# What a cached model rests on, beside what is in this file.
SOURCES = ("model.py", "moe.py", "loop.py", "objectives.py", "data/tokenizer.py", "data/batches.py")


# ---- models to unlearn ------------------------------------------------------------------------------------------

def small_config(args: argparse.Namespace, vocab_size: int) -> Config:
    """The small GPT is a Llama, the small MoE an OLMoE (q/k norm over all heads, kept weights not renormalised)."""
    moe = dict(n_expert=args.experts, top_k=args.top_k, qk_norm="full") if args.arch == "moe" else {}
    try:
        return Config(vocab_size=vocab_size, n_layer=args.layers, n_head=args.heads, n_kv_head=args.heads,
                      d_model=args.width, d_ff=args.ff or (64 if moe else 384), max_len=args.context, **moe)
    except ValueError as error:
        raise UserError(str(error)) from None


def learn(args: argparse.Namespace, model: GPT, rows: list[Row], tokenizer, seed: int, folder: Path, what: str,
          epochs: int, batch_size: int, lr: float, weight_decay: float, resume: bool,
          topics: list[int] | None = None) -> dict:
    """Cross entropy on the rows' answers, plus load balancing for a MoE; returns loop.fit's report.

    topics: of which set each row is, for --specialise, which also rewards routers for telling the sets apart.
    """
    examples = encode_rows(rows, tokenizer, args.context, "row", truncate=True)
    topic_of = torch.tensor(topics, device=args.device) if topics else None

    def losses(step: int) -> dict[str, Tensor]:
        batch = collate_at(examples, batch_size, seed, step, args.device)
        trace = Trace()
        loss = objectives.cross_entropy(model(batch.tokens, trace=trace), batch.labels)
        terms = {"ce": loss, "loss": loss}
        if model.is_moe:
            routings = list(trace.routing.values())
            terms["balance"] = load_balancing_loss(routings, batch.mask)
            terms["loss"] = loss + args.balance * terms["balance"]
            if topic_of is not None:  # on answers alone: the first words of a question are those of every set
                terms["topic"] = topic_information(routings, batch.labels >= 0, topic_of[batch.index])
                terms["loss"] = terms["loss"] - args.specialise * terms["topic"]
        return terms

    model.checkpointing = args.checkpointing
    model.train()
    report = fit(list(model.parameters()), losses, epochs * -(-len(examples) // batch_size), lr, folder, what, seed,
                 weight_decay=weight_decay, save_every=args.save_every, resume=resume)
    model.eval()
    return report


def cached_model(args: argparse.Namespace, data: DataSet, tokenizer: Tokenizer, role: str) -> Path:
    """Folder of the target, the reference or a further reference (`reference-2`...), trained now if it is not there."""
    sets = [data.retain, data.background] + ([data.forget] if role == "target" else [])
    rows = [row for one_set in sets for row in one_set]
    topics = [number for number, one_set in enumerate(sets) for _ in one_set] if args.specialise else None
    seed = args.seed + 1000 * int(role.rpartition("-")[2]) if "-" in role else args.seed
    shape = {key: getattr(args, key) for key in (
        "arch", "layers", "heads", "width", "ff", "experts", "top_k", "context", "vocab_size", "pretrain_epochs",
        "pretrain_batch_size", "pretrain_lr", "balance", "specialise")}
    here = Path(__file__).parent
    taught = [[row[key] for key in ("question", "answer", "text") if key in row] for row in rows]
    # a tokenizer does not depend on the order of its texts: so the splits of one data set share their target
    made_of = [shape, seed, taught, topics, sorted(data.texts()), inspect.getsource(learn),
               inspect.getsource(small_config), *((here / name).read_text() for name in SOURCES)]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(args.out) / "cache" / f"{args.arch}-{Path(args.forget or args.data).resolve().stem}-{role}-{key}"
    partial = folder.with_name(folder.name + ".partial")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be training the very same model: wait for it
        if folder.is_dir():
            return folder
        partial.mkdir(exist_ok=True)
        torch.manual_seed(seed)
        model = GPT(small_config(args, tokenizer.vocab_size)).to(args.device)
        report = learn(args, model, rows, tokenizer, seed, partial, role, args.pretrain_epochs,
                       args.pretrain_batch_size, args.pretrain_lr, weight_decay=0.1, resume=True, topics=topics)
        if report["diverged"]:
            raise UserError(f"pretraining the {role} diverged: lower --pretrain-lr (now {args.pretrain_lr})")
        save(model, tokenizer, partial / "model")
        partial.rename(folder)
    return folder


def open_public(args: argparse.Namespace) -> tuple[GPT, object]:
    """The model of --model and its tokenizer. Sets args.context where the command line did not."""
    model, tokenizer = load(weights_of(args.model), getattr(torch, args.dtype), args.device, args.template)
    args.context = min(args.context or 512, model.config.max_len)
    if not model.is_moe and (args.repair_routers or args.balance_retain):
        raise UserError(f"--repair-routers and --balance-retain need a mixture of experts, and {args.model} is dense")
    if args.method in ("uoe", "esft") and not model.is_moe:
        raise UserError(f"--method {args.method} needs a mixture of experts, and {args.model} is dense: make it one "
                        "with --method upcycle, or use --method full")
    return model, tokenizer


def check_tokens(args: argparse.Namespace, tokenizer, data: DataSet) -> None:
    """Raises UserError where the reference reads text otherwise than the target: their scores would not compare."""
    folder = find_folder(weights_of(args.reference))
    theirs = load_tokenizer(folder, read_config(folder), args.template)
    few = data.texts()[:20]
    if not isinstance(theirs, NoTokenizer) and [theirs.encode(t) for t in few] != [tokenizer.encode(t) for t in few]:
        raise UserError(f"--reference {args.reference} has another tokenizer than --model {args.model}: their scores "
                        "do not compare, so give a model of the same family")


# ---- runs ---------------------------------------------------------------------------------------------------------

def decoding_note(args: argparse.Namespace, target: str) -> str:
    """What a saved assistant needs to be told by: its target, and how to decode with both."""
    here = "this folder"
    return (f"ULD assistant (arXiv 2406.08607) of the target `{weights_of(target)}`. By itself it says what is to be "
            f"forgotten.\n\nDecode with both: logits = target - {args.subtract} * assistant, where the assistant is "
            f"{here}; tokens whose target probability is below {args.filter_rate} of the likeliest are ruled out.\n\n"
            "```python\nfrom pretrained import load\nfrom uld import LogitDifference\n"
            f"target, tokenizer = load({str(weights_of(target))!r})\nassistant, _ = load({here!r})\n"
            f"model = LogitDifference(target, assistant, {args.subtract}, {args.filter_rate}, "
            f"centred={args.centre})\n```\n")


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's memory, or of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.seeds:
        argv = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
        folders = []
        for seed in args.seeds.split(","):
            name = f"{args.name}-seed{seed}"
            this = parse([*argv, "--seed", seed, "--seeds", "", "--name", name])
            this.named = args.named  # by the user, not by the line above
            folder = RunFolder(this)
            if args.resume and folder.finished():  # before the cut
                folder.check_same()
                folders.append(folder.final)
                continue
            this.resume = args.resume and folder.cut_off()
            folders.append(one(this))
        if args.unlearns:
            print("\n" + compare(folders))
    else:
        one(args)


def one(args: argparse.Namespace) -> Path:
    """One run; returns its folder."""
    folder = RunFolder(args)
    if args.method == "upcycle":
        return main_upcycle(args, folder)
    if args.teacher:
        check_teacher(args)
    data = data_of(vars(args))
    print(f"{data.name}: {len(data.forget)} rows to forget, {len(data.retain)} to keep, {len(data.background)} beside")
    if args.model:
        target, tokenizer = open_public(args)
    else:
        tokenizer = Tokenizer.train(data.texts(), args.vocab_size)
    for name, rows in (("forget", data.forget), ("retain", data.retain)):
        cut = sum(is_cut(row, tokenizer, args.context) for row in rows)
        if cut:
            print(f"{cut} of {len(rows)} {name} rows are longer than --context {args.context}: they are taught up to "
                  "there, and scored as far as the model's own context reaches")
    for name, rows in data.scored.items():  # a row that cannot be scored is said now, not after an hour
        encode_rows(rows, tokenizer, args.context, f"{name} row", truncate=bool(args.model))
    if args.method == "finetune":
        return main_finetune(args, folder, data, target, tokenizer)

    scores = {}
    if args.model:
        places = {"target": args.model} | ({"reference": args.reference} if args.reference else {})
        if args.reference and not Path(args.reference).is_file():
            check_tokens(args, tokenizer, data)
    else:
        roles = ["target", "reference", *(f"reference-{i}" for i in range(2, args.references + 1))]
        places = {role: str(cached_model(args, data, tokenizer, role)) for role in roles}
        target, _ = load(weights_of(places["target"]), device=args.device)
    config = {**vars(args), "torch": torch.__version__, "revision": revision(), **places}
    for role, place in places.items():
        loaded = target if role == "target" else None
        scores[role] = scores_of(place, config, data, tokenizer, role, args.device, loaded)

    teacher = None
    if args.teacher:
        run = open_run(args.teacher, args.device)
        if run.config["target"] != places["target"]:
            raise UserError(f"--teacher {args.teacher} has another target ({run.config['target']}) than this run "
                            f"({places['target']}): give the options that it was made with")
        teacher = run.model
    partial = folder.open()
    watch = path_writer(partial, tokenizer, data, scores, target) if args.path else None
    # methods that train assistants leave the target as it is; the others change a copy, which is compared with it
    learner = target if args.method in ("uld", "offset", "divergence") else copy.deepcopy(target)
    model, to_save, report = unlearn(args, learner, tokenizer, data, partial, config, watch, teacher)
    if args.repair_routers:
        uoe.repair_routers(target, model, in_order(encode_rows(data.retain, tokenizer, args.context, truncate=True), 64,
                                                   args.device))
    memory = peak_memory(args.device)
    for name, kept in to_save.items():
        shutil.rmtree(partial / name, ignore_errors=True)  # of a run that was cut off after this point
        save(kept, tokenizer, partial / name)
    if report["diverged"] and (partial / "path.jsonl").is_file():  # what was gone back on is no part of the path
        lines = [line for line in (partial / "path.jsonl").read_text().splitlines()
                 if json.loads(line)["step"] <= report["steps"]]
        (partial / "path.jsonl").write_text("".join(line + "\n" for line in lines))
    if args.method == "uld":
        (partial / "assistant" / "README.md").write_text(decoding_note(args, places["target"]))
    config["kept"] = list(to_save)
    scores["unlearned"] = evaluate(model, tokenizer, data, "unlearned")
    run = {key: config[key] for key in ("method", "forget_loss", "retain_loss", "trainable_parameters",
                                        "total_parameters", "seed")} | report | {"peak_memory_bytes": memory}
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    models = {"target": target}
    if "reference" in places and not Path(places["reference"]).is_file():
        models["reference"] = load(weights_of(places["reference"]), target.embed.weight.dtype, args.device,
                                   args.template)[0]
    finish_report(partial, run, data, tokenizer, scores, models | {"unlearned": model})
    return folder.close()


def path_writer(folder: Path, tokenizer, data: DataSet, scores: dict[str, Scores], target: GPT,
                rows: int = 100) -> Callable[[dict, object], None]:
    """--path: a line of path.jsonl per epoch, on at most `rows` rows of each set but the whole forget set."""
    few = copy.copy(data)
    few.scored = {name: of if name == "forget" else of[:rows] for name, of in data.scored.items()}
    file = folder / "path.jsonl"
    batches = forget_batches(target, tokenizer, data) if target.is_moe else []

    def watch(where: dict, model) -> None:
        lines = file.read_text().splitlines() if file.is_file() else []
        lines = [line for line in lines if json.loads(line)["step"] < where["step"]]  # a resumed run comes by again
        block = summarise({**scores, "unlearned": evaluate(model, tokenizer, few, f"epoch {where['epoch']}")}, few)
        line = where | {key: block["unlearned"][key] for key in ("model_utility", "forget_quality", "forget_quality_D")}
        for name, of in block["unlearned"].items():
            if isinstance(of, dict):
                line |= {f"{name} exact": of.get("exact"), f"{name} rougeL": of["rougeL_recall"],
                         f"{name} loss": of["loss"]}
        if batches and isinstance(model, GPT):
            layers = routing_overlap(target, model, batches)
            line["routing_overlap"] = sum(layers) / len(layers)
        file.with_suffix(".tmp").write_text("\n".join([*lines, json.dumps(line)]) + "\n")
        file.with_suffix(".tmp").replace(file)

    return watch


def check_teacher(args: argparse.Namespace) -> None:
    """Says at once, not after a target has been trained, that --teacher was made with other options."""
    path = Path(args.teacher) / "config.json"
    if not path.is_file():
        raise UserError(f"--teacher {args.teacher} is not a run folder: give one that train.py wrote, such as out/uld")
    theirs = json.loads(path.read_text())
    for key in ("model", "data", "split", "authors", "forget", "retain", "seed", "arch", "layers", "heads", "width",
                "ff", "context", "vocab_size", "pretrain_epochs"):
        if not args.model or key in ("model", "data", "split", "authors", "forget", "retain"):
            if theirs.get(key) != getattr(args, key):
                raise UserError(f"--teacher {args.teacher} was made with --{key.replace('_', '-')} {theirs.get(key)}, "
                                f"not {getattr(args, key)}: give the options that it was made with")


def main_finetune(args: argparse.Namespace, folder: RunFolder, data: DataSet, model: GPT, tokenizer) -> Path:
    """--method finetune: the target, or with a retain split the reference, from a base checkpoint."""
    partial = folder.open()
    rows = data.retain + data.background + ([] if args.keeps_only else data.forget)
    report = learn(args, model, rows, tokenizer, args.seed, partial, "finetune", args.epochs, args.batch_size, args.lr,
                   args.weight_decay, args.resume)
    memory = peak_memory(args.device)
    save(model, tokenizer, partial / "model")
    scores = {"target": evaluate(model, tokenizer, data, "fine-tuned")}
    size = sum(p.numel() for p in model.parameters())
    run = {"method": "finetune", "forget_loss": None, "retain_loss": None, "trainable_parameters": size,
           "total_parameters": size, "seed": args.seed} | report | {"peak_memory_bytes": memory}
    config = {**vars(args), "torch": torch.__version__, "revision": revision(), "target": args.model}
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    finish_report(partial, run, data, tokenizer, scores, {"target": model})
    return folder.close()


def main_upcycle(args: argparse.Namespace, folder: RunFolder) -> Path:
    """--method upcycle: out/<name>/model is the mixture of experts; fine-tune it, then unlearn."""
    dense, tokenizer = open_public(args)
    sparse = upcycle(dense, args.experts, args.top_k, generator=torch.Generator().manual_seed(args.seed))
    partial = folder.open()
    save(sparse, tokenizer, partial / "model")
    config = {**vars(args), "torch": torch.__version__, "revision": revision(), "target": args.model}
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    print(f"{args.experts} experts, {args.top_k} per token: {sum(p.numel() for p in dense.parameters()):,} parameters "
          f"became {sum(p.numel() for p in sparse.parameters()):,}")
    return folder.close()


if __name__ == "__main__":
    main()
