"""Every flag of train.py, what it means, and what each method takes where the command line is silent."""

import argparse
import hashlib
from pathlib import Path

import torch

from data import WORLDS
from errors import UserError
from uld import check_depth, check_lora
from unlearn import FORGET_LOSSES, RETAIN_LOSSES, TRAINEES
from uoe import check_layer, check_place, select_experts

# What each method takes where the command line is silent. SMALL: our own models, found as README, "Honest limits",
# says. PUBLIC: with --model; layers, learning rates, filter and ULD's weights are the papers', the rest is TOFU's.
LOSSES = {"rmu": (None, "hidden")}  # of a forget loss; others: npo, gd
OWN_LOSSES = {"uld": ("ce", "uniform"), "divergence": ("ce", "gd"), "distill": ("teacher", "teacher"),
              "distill-lora": ("teacher", "teacher")}  # methods that are their losses
SMALL = {
    # NPO sums over an answer's tokens and GD averages over them, so GD needs a weight to be heard
    "uoe": {"arch": "moe", "lr": 1.2e-2, "epochs": 32, "retain_weight": 20.0, "npo_beta": 1.0, "stop_at": 0.1,
            "layer": "middle", "router_lr": 0.1},
    "uld": {"arch": "gpt", "lr": 3e-3, "epochs": 20, "retain_weight": 6.5, "subtract": 0.7, "filter_rate": 0.0},
    "full": {"arch": "moe", "lr": 1e-4, "epochs": 24, "retain_weight": 20.0, "npo_beta": 1.0, "stop_at": 0.1},
    "lora": {"arch": "moe", "lr": 1e-3, "epochs": 24, "retain_weight": 20.0, "npo_beta": 1.0, "stop_at": 0.1},
    "esft": {"arch": "moe", "lr": 1e-3, "epochs": 24, "retain_weight": 20.0, "npo_beta": 1.0, "stop_at": 0.1},
    "offset": {"arch": "gpt", "lr": 3e-3, "epochs": 20, "retain_weight": 20.0, "npo_beta": 1.0, "stop_at": 0.1},
    "divergence": {"arch": "gpt", "lr": 3e-3, "epochs": 20},
    "distill": {"arch": "gpt", "lr": 3e-4, "epochs": 10},
    "distill-lora": {"arch": "gpt", "lr": 3e-3, "epochs": 10},
}
ELSEWHERE = {"uld": {"subtract": 0.75, "filter_rate": 1e-2}}  # off the embedded world: the paper's decoding
SMALL_BY_LOSS = {"rmu": {"retain_weight": 40.0}, "ga": {"retain_weight": 5.0}}  # before the method's
PUBLIC = {
    "uoe": {"lr": 1e-4, "epochs": 5, "retain_weight": 1.0, "layer": "all", "router_lr": 1.0},
    "uld": {"lr": 1e-3, "epochs": 10, "retain_weight": 6.5, "subtract": 0.75, "filter_rate": 1e-2},
    "full": {"lr": 1e-5, "epochs": 5, "retain_weight": 1.0},
    "lora": {"lr": 1e-4, "epochs": 5, "retain_weight": 1.0},
    "esft": {"lr": 1e-5, "epochs": 5, "retain_weight": 1.0},
    "offset": {"lr": 1e-4, "epochs": 5, "retain_weight": 1.0},
    "divergence": {"lr": 1e-3, "epochs": 10},
    "distill": {"lr": 1e-5, "epochs": 5},
    "distill-lora": {"lr": 1e-4, "epochs": 5},
    "finetune": {"lr": 1e-5, "epochs": 5},
    "upcycle": {},
}
OTHERWISE = {"npo_beta": 0.1, "layer": "middle", "router_lr": 1.0, "subtract": 0.75, "filter_rate": 0.0,
             "retain_weight": 1.0, "lr": 1e-4, "epochs": 1}  # for methods that do not look at them
PRETRAIN_EPOCHS = {"moe": 8, "gpt": 6}  # enough for every held-out wording; more only makes a target surer of itself


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults, but not to those that the help tells in words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="unlearn part of what a model learnt, and score it",
                                     formatter_class=Help)
    say = parser.add_argument_group("what to do").add_argument
    say("--method", default="uoe", help="what trains: " + ", ".join([*TRAINEES, "finetune", "upcycle"]))
    say("--forget-loss", help="what it forgets by: " + ", ".join(FORGET_LOSSES) + " (default: npo; uld: ce)")
    say("--retain-loss", help="what it keeps by: " + ", ".join(RETAIN_LOSSES) + " (default: gd; uld: uniform)")
    say("--seed", type=int, default=0, help="of the world, the models and the order of rows")
    say("--seeds", help="several, as in 0,1,2: a run each, then mean and spread")
    say("--name", help="of the run folder; default: what was chosen")
    say("--out", default="out", help="where run folders and the cache go")
    say("--resume", action="store_true", help="go on with the cut-off run of this name")
    say("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    say = parser.add_argument_group("data").add_argument
    say("--data", default="world", help="world (some authors to forget), topic (all potions), tofu, or a folder "
                                      "with JSON files of theirs")
    say("--split", default="forget10", help="of TOFU: forget01, forget05, forget10; to fine-tune on what is kept: "
                                            "retain99, retain95, retain90")
    say("--authors", type=int, default=0, help="cut TOFU to so many authors; 0: all 200")
    say("--augmented", help="folder with the ULD authors' CSV files, for --data tofu")
    say("--protocol", default="tofu", help="of TOFU's scoring: tofu (first 300 rows, 200 tokens) or openunlearning")
    say("--score-rows", type=int, default=0, help="score at most so many rows of each set; 0: the protocol's")
    say("--forget", help="your own JSON lines to forget")
    say("--retain", help="your own JSON lines to keep")
    say = parser.add_argument_group("a public model").add_argument
    say("--model", help="a Hugging Face folder, a hub name, or a run folder: the target")
    say("--reference", help="for forget quality: a model or run that never saw the forget set, or its published log")
    say("--template", help="of prompts: llama2, llama3, smollm2, plain (default: the checkpoint's own)")
    say("--dtype", choices=("float32", "bfloat16", "float16"), help="of its weights; what trains has float32 copies "
                                                                    "(default: bfloat16 with --model)")
    say = parser.add_argument_group("the small model and its pretraining").add_argument
    say("--arch", choices=("gpt", "moe"), help="dense or mixture of experts (default: the method's)")
    say("--layers", type=int, default=4)
    say("--heads", type=int, default=4)
    say("--width", type=int, default=128, help="of the residual stream")
    say("--ff", type=int, default=0, help="width of an MLP or expert; 0: 384 dense, 64 per expert")
    say("--experts", type=int, help="per layer (default: 16; upcycling: 8)")
    say("--top-k", type=int, help="experts per token (default: 4; upcycling: 2)")
    say("--context", type=int, default=0, help="longest sequence; 0: 64 for the world, 256 otherwise, 512 with --model")
    say("--vocab-size", type=int, default=0, help="of the tokenizer; 0: 1024 for the world, 4096 otherwise")
    say("--pretrain-epochs", type=int, default=0, help="0: " + ", ".join(f"{n} for {a}" for a, n in
                                                                          PRETRAIN_EPOCHS.items()))
    say("--pretrain-batch-size", type=int, default=32)
    say("--pretrain-lr", type=float, default=3e-3)
    say("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    say("--specialise", type=float, default=0.0, help="weight of I(topic; expert) in pretraining: what is kept, what "
                                                     "is beside and what will be forgotten get experts of their own")
    say("--references", type=int, default=1, help="retain-only models; a second one gives the null of forget quality")
    say = parser.add_argument_group("training").add_argument
    say("--epochs", type=int, help="passes over the forget set (default: the method's)")
    say("--stop-at", type=float, help="stop after the epoch in which the share of forget rows that are still answered "
                                      "word for word falls to this, so that methods compare at one level of "
                                      "forgetting; -1: never (default: the method's)")
    say("--lr", type=float, help="peak learning rate (default: the method's)")
    say("--batch-size", type=int, default=32, help="forget rows per step, and as many retain rows")
    say("--retain-weight", type=float, help="lambda of UOE, beta of ULD (default: the method's)")
    say("--weight-decay", type=float, default=0.01)
    say("--npo-beta", type=float, help="(default: 0.1; small models: the method's)")
    say("--dpo-beta", type=float, default=0.1)
    say("--simnpo-beta", type=float, default=2.5)
    say("--simnpo-gamma", type=float, default=0.0)
    say("--di-offset", type=float, default=10.0, help="deliberate imagination: added to all tokens but the right one")
    say("--steering", type=float, default=4.0, help="RMU: length of the control vector, in mean hidden lengths")
    say("--rmu-layer", type=int, help="RMU: whose output is steered (default: the unlearned expert's, or the middle)")
    say("--lora-rank", type=int, default=32)
    say("--lora-alpha", type=float, default=32.0)
    say("--lora-dropout", type=float, default=0.05)
    say("--lora-targets", default="all", help="of --method lora: all, attn, mlp")
    say("--path", action="store_true", help="score after every epoch too, into path.jsonl; eval.py --compare draws it")
    say("--checkpointing", action="store_true", help="recompute blocks in the backward pass: less memory, more time")
    say("--save-every", type=int, default=100, help="steps between states that --resume can go on from")
    say("--teacher", help="of distill and distill-lora: the run whose logits are learnt, e.g. out/uld")
    say = parser.add_argument_group("UOE").add_argument
    say("--m", type=int, default=1, help="how many experts to unlearn")
    say("--layer", help="choose within this layer (a number or 'middle'), or 'all' (default: middle; --model: all)")
    say("--same-layer", action="store_true", help="all of them from the layer with the highest affinity")
    say("--select", choices=("top", "random", "bottom"), default="top", help="by affinity")
    say("--affinity-rank", type=int, default=1, help="begin with the expert of this rank")
    say("--expert", help="layer,expert by hand, both counted from 0")
    say("--anchor-weight", type=float, default=1.0, help="alpha of equation 4")
    say("--attribution-tokens", type=int, default=0, help="calibrate on so many forget tokens; 0: all")
    say("--router-lr", type=float, help="the router's learning rate, as a multiple of --lr (default: 0.1; --model: 1)")
    say("--freeze-router", action="store_true", help="train the expert alone")
    say("--balance-retain", action="store_true", help="weigh retain tokens so that they engage experts as forget "
                                                            "tokens do (TRACE); for --retain-loss gd or kl")
    say("--repair-routers", action="store_true", help="afterwards refit all routers to score as they did (GRIP)")
    say("--with-shared", action="store_true", help="train the layer's shared expert too")
    say("--esft-p", type=float, default=0.15, help="ESFT: share of a layer's affinity that its chosen experts reach")
    say = parser.add_argument_group("ULD and offset").add_argument
    say("--assistant-layers", type=int, default=0, help="K; 0: three quarters of the target's; --model: a quarter")
    say("--subtract", type=float, help="alpha of ULD's equation 2 (default: 0.75, as the paper; on the world: 0.7)")
    say("--filter-rate", type=float, help="tokens less likely than this share of the likeliest are out of the "
                                          "assistant's reach; 0: none (default: 0.01, as the paper; on the world: 0)")
    say("--centre", action="store_true", help="take the assistant's logits from their mean, so that a uniform one "
                                              "changes nothing where the filter is on (uld.LogitDifference)")
    say("--uld-retain", type=float, default=1.0, help="regular retain rows in D'_r, as a multiple of the forget rows")
    say("--no-paraphrased", action="store_true", help="leave the paraphrased rows out of D'_f")
    say("--no-perturbed", action="store_true", help="leave the perturbed rows out of D'_r")
    say("--stray-perturbed", type=float, default=0.0, help="wrong answers about retain rows too, so often as there "
                                                           "are forget rows: the ULD authors' files hold such")
    say("--uniform-on", choices=("answer", "all"), default="answer", help="tokens of D'_r that are to be uniform; the "
                                                                          "ULD authors' loss takes the question's too")
    say("--offset-alpha", type=float, default=1.0, help="weight of the assistant's change")
    args = parser.parse_args(argv)
    given = {key: value for key, value in vars(args).items() if value != parser.get_default(key)}
    return check(args, given)


def check(args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """Fill in what the method decides; raises UserError naming the first flag that makes no sense.

    given: the flags that the command line set, as it set them.
    """
    methods = PUBLIC if args.model else SMALL
    if args.method not in PUBLIC:
        raise UserError(f"--method {args.method} is unknown: choose one of {', '.join(PUBLIC)}")
    if args.method not in methods:
        raise UserError(f"--method {args.method} needs --model: a Hugging Face folder, a hub name or a run folder")
    args.unlearns = args.method in TRAINEES
    if args.unlearns:
        forget, retain = OWN_LOSSES.get(args.method, ("npo", "gd"))
        args.forget_loss = args.forget_loss or forget
        args.retain_loss = args.retain_loss or LOSSES.get(args.forget_loss, (None, retain))[1]
    elif args.forget_loss or args.retain_loss:
        raise UserError(f"--forget-loss and --retain-loss: --method {args.method} forgets nothing")
    chosen = methods[args.method]
    on_world = args.data in WORLDS and not args.forget
    by_loss = SMALL_BY_LOSS.get(args.forget_loss, {}) if not args.model else {}
    elsewhere = ELSEWHERE.get(args.method, {}) if not on_world else {}
    for key, value in (OTHERWISE | chosen | elsewhere | by_loss).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for flag, table in (("forget_loss", FORGET_LOSSES), ("retain_loss", RETAIN_LOSSES)):
        if args.unlearns and getattr(args, flag) not in table:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is unknown: "
                            f"choose one of {', '.join(table)}")
    own, pair = OWN_LOSSES.get(args.method), (args.forget_loss, args.retain_loss)
    if args.unlearns and own and pair != own:
        raise UserError(f"--method {args.method} with --forget-loss {pair[0]} and --retain-loss {pair[1]}: its own are "
                        f"{' and '.join(own)}, and no others make sense")
    if args.unlearns and not own and (pair[0] in ("ce", "teacher") or pair[1] in ("uniform", "teacher")):
        raise UserError(f"--method {args.method} with --forget-loss {pair[0]} and --retain-loss {pair[1]}: ce, teacher "
                        f"and a retaining uniform belong to {', '.join(OWN_LOSSES)} alone")
    if args.method.startswith("distill") != bool(args.teacher):
        raise UserError("--teacher RUN and --method distill or distill-lora go together")
    if args.repair_routers and (args.arch == "gpt" or args.method in ("uld", "offset", "divergence")):
        raise UserError("--repair-routers is for methods that change the weights of a mixture of experts")
    if args.reference and args.method in ("finetune", "upcycle"):
        raise UserError(f"--reference is what unlearning is scored against, and --method {args.method} does none")
    if args.reference and not args.model:
        raise UserError("--reference is for --model: a small model's reference is trained beside it")
    if args.model and args.references > 1:
        raise UserError("--references counts small models that are trained; with --model give --reference")
    if args.method in ("finetune", "upcycle") and (args.path or args.stop_at is not None):
        raise UserError(f"--path and --stop-at follow unlearning, and --method {args.method} does none")
    for flag in ("m", "layer", "same_layer", "select", "affinity_rank"):
        if args.expert and flag in given:
            raise UserError(f"--expert names one expert, and --{flag.replace('_', '-')} chooses: give one of the two")
    if args.same_layer and given.get("layer", "all") != "all":
        raise UserError(f"--layer {args.layer} names the layer, and --same-layer chooses it: give one of the two")
    if args.balance_retain and (args.arch == "gpt" or args.method in ("offset", "divergence") or
                                args.retain_loss not in ("gd", "kl")):
        raise UserError("--balance-retain weighs the retain tokens of a mixture of experts, by --retain-loss gd or kl")
    if args.specialise and (args.model or args.arch == "gpt"):
        raise UserError("--specialise is about pretraining a small mixture of experts: --arch moe, without --model")
    if args.method != "uld" and (args.stray_perturbed or args.uniform_on == "all"):
        raise UserError("--stray-perturbed and --uniform-on are about the D'_r of --method uld")
    if args.method != "uld" and args.centre:
        raise UserError("--centre is about decoding with the assistant of --method uld")
    if args.method == "offset" and (args.forget_loss == "rmu" or args.retain_loss == "hidden"):
        raise UserError(f"--method {args.method} has no hidden states of its own to steer: --forget-loss npo, say")
    if args.method in ("uoe", "esft") and args.arch == "gpt":
        raise UserError(f"--method {args.method} needs a mixture of experts: leave out --arch gpt")
    if args.model and args.arch:
        raise UserError("--arch is of the small model: --model brings its own")
    if args.seeds and not all(seed.isdigit() for seed in args.seeds.split(",")):
        raise UserError(f"--seeds {args.seeds} is not a list of whole numbers, as in 0,1,2")
    if args.expert:
        try:
            layer, expert = map(int, args.expert.split(","))
        except ValueError:
            raise UserError(f"--expert {args.expert} is not layer,expert: two whole numbers, as in 2,7") from None
        args.expert = (layer, expert)
    if args.layer not in ("middle", "all") and not args.layer.isdigit():
        raise UserError(f"--layer {args.layer} is not a layer's number, 'middle' or 'all'")
    if args.experts is None:
        args.experts = 8 if args.method == "upcycle" else 16
    if args.top_k is None:
        args.top_k = 2 if args.method == "upcycle" else 4
    args.dtype = args.dtype or ("bfloat16" if args.model else "float32")
    if not args.model and args.dtype != "float32":
        raise UserError(f"--dtype {args.dtype} is for --model: the small models are float32")
    args.pretrain_epochs = args.pretrain_epochs or PRETRAIN_EPOCHS.get(args.arch, 1)
    for flag in ("layers", "heads", "width", "experts", "top_k", "pretrain_epochs", "pretrain_batch_size", "epochs",
                 "batch_size", "references", "m", "save_every", "lr", "pretrain_lr", "npo_beta", "dpo_beta",
                 "simnpo_beta", "router_lr", "affinity_rank"):
        if not getattr(args, flag) > 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is not above 0")
    for flag in ("seed", "ff", "context", "vocab_size", "balance", "specialise", "retain_weight", "weight_decay",
                 "anchor_weight", "attribution_tokens", "authors", "score_rows", "uld_retain", "stray_perturbed",
                 "assistant_layers"):
        if getattr(args, flag) < 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is below 0")
    if args.seed >= 2**32:
        raise UserError(f"--seed {args.seed} is not below 2^32")
    if args.stop_at is not None and (args.method == "uld" or not -1 <= args.stop_at < 1):
        raise UserError(f"--stop-at {args.stop_at} is not a share below 1 (-1: never stop), or the method is uld, "
                        "whose assistant learns the forget rows")
    if not 0 <= args.lora_dropout < 1:
        raise UserError(f"--lora-dropout {args.lora_dropout} is not at least 0 and below 1")
    for flag in ("filter_rate", "esft_p"):
        if not 0 <= getattr(args, flag) <= 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is not between 0 and 1")
    args.keeps_only = args.split.startswith("retain") and args.split.removeprefix("retain").isdigit()
    if args.keeps_only:
        if args.method != "finetune":
            raise UserError(f"--split {args.split} is for --method finetune; to unlearn, give the forget split")
        args.split = f"forget{100 - int(args.split.removeprefix('retain')):02d}"
    check_lora(args.lora_rank, args.lora_targets)
    if not args.model:
        check_shape(args)
        args.context = args.context or (64 if on_world else 256)
        args.vocab_size = args.vocab_size or (1024 if on_world else 4096)
        if args.vocab_size < 300:
            raise UserError(f"--vocab-size {args.vocab_size} is below 300: 256 bytes and the special tokens come first")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device} is not here: try --device cpu") from None
    args.named = bool(args.name)
    if not args.name:
        args.name = name_of(args, chosen, given)
    if Path(args.name).name != args.name or args.name in ("..", "cache"):
        raise UserError(f"--name {args.name} is not a plain folder name of its own: --out says where it goes")
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be made ({error.strerror}): give another folder") from None
    return args


def check_shape(args: argparse.Namespace) -> None:
    """What the small model's layers and experts rule out, said before it is trained."""
    if args.with_shared:
        raise UserError("--with-shared: the small models have no shared experts")
    if args.assistant_layers:
        check_depth(args.assistant_layers, args.layers)
    if args.rmu_layer is not None:
        check_layer("--rmu-layer", args.rmu_layer, args.layers)
    if args.method == "uoe" and args.expert:
        check_place(args.expert, args.layers, args.experts)
    elif args.method == "uoe":
        anywhere = args.same_layer or args.layer == "all"
        layer = None if anywhere else 0 if args.layer == "middle" else int(args.layer)
        select_experts(torch.zeros(args.layers, args.experts), args.m, args.same_layer, layer=layer,
                       rank=args.affinity_rank)


# Flags that a run's name has words for already, or that leave its outcome alone.
UNNAMED = {"method", "forget_loss", "retain_loss", "arch", "model", "data", "split", "seed", "seeds", "forget",
           "retain", "teacher", "name", "out", "resume", "device", "path", "save_every", "checkpointing", "reference",
           "references", "augmented"}


def name_of(args: argparse.Namespace, chosen: dict, given: dict) -> str:
    """The run folder's name where none is given: method, losses, model, data, then every other flag given, the seed.

    So runs that were asked for differently mostly have different names; where not, runs.RunFolder refuses the second.
    """
    parts = [args.method]
    if args.unlearns:
        forget, retain = OWN_LOSSES.get(args.method, ("npo", "gd"))
        parts += [args.arch] if args.arch != chosen.get("arch") else []
        parts += [loss for loss, usual in ((args.forget_loss, forget), (args.retain_loss, retain)) if loss != usual]
    if args.model:
        parts.append(Path(args.model).name)
    if args.teacher:
        parts.append(Path(args.teacher).name)
    if args.data != "world" or args.forget:
        parts.append(Path(args.forget or args.data).stem)
        if not args.forget and args.data not in WORLDS and not args.keeps_only:
            parts.append(args.split)
    if args.keeps_only:
        parts.append(args.split.replace("forget", "without"))
    parts += ["augmented"] if args.augmented else []
    for key, value in given.items():
        if key not in UNNAMED:
            parts.append(key.replace("_", "-") + ("" if value is True else
                                                  f"{value:g}" if isinstance(value, float) else str(value)))
    name, seed = "-".join(parts), f"-seed{args.seed}" if args.seed else ""
    if len(name) > 150:  # file systems have names of up to 255 bytes
        name = name[:140] + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return name + seed
