"""From the composed config to plain settings, checked as far as that is possible before data and models are there."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.config import components as conf
from kd.config.security import check_secrets
from kd.errors import UserError, check
from kd.system import files

Settings = conf.Node


def resolve(cfg: DictConfig, typed: list[str]) -> Settings:
    """The config as plain containers, checked as far as that is possible before data and models are there."""
    if "hydra" in cfg:
        cfg = OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"])
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]} is needed here: type {missing[0]}=VALUE.")
    try:
        settings = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(str(error)) from None
    expand_paths(settings)
    conf.check_targets(settings)
    for word in typed:
        if word.startswith("~") and word.strip("~").partition("=")[0] not in (*conf.GROUPS, *conf.PLAIN):
            raise UserError(f"{word}: every setting is needed; type NAME=VALUE to change it.")
    conf.check_plain(settings)
    settings["root"] = settings["root"].rstrip("/") or "/"  # one name for one place
    count_steps(settings, typed)
    check_secrets(f"{name}={value}" for name, value in conf.flat(settings).items())  # of the environment, too
    if settings["scale"] != "cpu":  # the runs of a sweep are not told of it
        raise UserError(f"scale={settings['scale']}: only a sweep has scales; type sweeps=scaling, or leave it out.")
    check_logits(settings, typed)
    check_ranks(settings)
    check_instructions(settings, typed)
    check_loss(settings)
    check_sampling(settings)
    check_lm(settings)
    check_teacher(settings)
    check_rollout(settings)
    own = tokenizer_name(settings)
    if name_of(settings["data"]) == "markov":
        own = "the states of the chain"
    if own and any(word.lstrip("+").startswith("data.vocab=") for word in typed):
        raise UserError(f"data.vocab would do nothing: no tokenizer is trained, since there is {own}. Leave it out.")
    return settings


PATHS = ("root", "path", "files", "name", "tokenizer")  # what settings are called that are paths, or may be


def expand_paths(node: Settings) -> None:
    """Replace ~ by the home folder in all settings that may be paths, in place."""
    for key, value in node.items():
        if isinstance(value, dict):
            expand_paths(value)
        elif key in PATHS:
            several = isinstance(value, list)
            found = [files.expanded(x) if isinstance(x, str) else x for x in (value if several else [value])]
            node[key] = found if several else found[0]


def count_steps(settings: Settings, typed: list[str]) -> None:
    """Make steps of trainer.tokens, in place; raises UserError where both were typed."""
    of, tokens = settings["trainer"], settings["trainer"].pop("tokens")
    if tokens is not None:
        if any(word.lstrip("+").startswith("trainer.steps=") for word in typed):
            raise UserError(f"trainer.tokens={tokens} and trainer.steps={of['steps']}: one of them says it all.")
        of["steps"] = -(-tokens // (of["batch"] * settings["data"]["seq_len"]))


def check_logits(settings: Settings, typed: list[str]) -> None:
    """Raise UserError where the source of logits lacks something, or leaves a word that was typed without effect."""
    how = source_of(settings)
    for word in typed:
        if how == "none" and group_of(word) in NO_SIGNAL:
            raise UserError(
                f"logits=none trains on text alone; {word} would do nothing: leave it out, or take logits=online."
            )
        if how in ("online", "cotrained") and group_of(word) == "record":
            raise UserError(
                f"logits={how} stores nothing; {word} would do nothing: leave it out, or take logits=offline to read "
                "what a store holds, or logits=none to record what a teacher says while it trains."
            )
    if is_recorded(settings) and (not settings["teacher"]["size"] or stored_part(settings)["name"] == "full"):
        what = "truncation=full" if settings["teacher"]["size"] else f"teacher.size={settings['teacher']['size']}"
        raise UserError(
            f"logits=recorded, {what}: a teacher of a size is trained, and some of what it says at each step is kept: "
            "take teacher=1m, say, and truncation=top_p_k."
        )
    dropped, where = kept_of(settings["truncation"])["name"], name_of(settings["target"])
    if how != "none" and dropped in ("full", "random") and where in ("rest", "leftover"):
        raise UserError(
            f"target={where} says where the probability goes that a truncation drops, and truncation={dropped} "
            f"{'drops none' if dropped == 'full' else 'is a sample that adds up to 1'}: leave it out, or take "
            "truncation=top_k, top_p or top_p_k."
        )
    if how == "cotrained" and settings["teacher"]["name"] and name_of(settings["optim"]) == "mup":
        raise UserError(
            "logits=cotrained has a pretrained teacher learn as the student does, and optim=mup is for sizes from "
            "scratch: type optim=adamw lr.peak=1e-4."
        )
    known = how == "none" or any(settings["teacher"].get(k) for k in ("size", "name"))
    if not known and not (how == "offline" and settings["logits"].get("path")):
        also = ", or logits.path=… to read a store, whoever wrote it" if how == "offline" else ""
        raise UserError(f"logits={how} needs a teacher: type teacher=1m, or logits=none to train without one{also}.")
    if how == "none" and settings["record"] and kept_of(settings["record"])["name"] == "full":
        raise UserError(
            "record=full: a teacher in training has another output layer at each step, so its whole distributions "
            "would take a number per token of the vocabulary. Take record=top_p_k, or record=random."
        )


def check_instructions(settings: Settings, typed: list[str]) -> None:
    """Raise UserError for a word that needs instructions, or a student of a size, to have an effect."""
    for word in typed:
        if not of_instructions(settings) and group_of(word) in ("responses", "plain"):
            raise UserError(f"{word} would do nothing beside plain text; type data=instructions, or leave it out.")
        if settings["student"]["name"] and word.startswith(("start.steps=", "start.batch=", "start.lr=")):
            raise UserError(
                f"{word} is of pretraining, and student.name={settings['student']['name']} is pretrained; leave it out."
                " Of fine-tuning are start.sft_steps, start.sft_batch and start.sft_lr."
            )


def check_loss(settings: Settings) -> None:
    """Raise UserError where a loss is not told what it asks for, or something is told to a loss that does not ask."""
    loss, tau = name_of(settings["loss"]), settings["temperature"]
    if loss == "minillm" and not settings["loss"]["single_step"] and settings["rollout"].get("from_next"):
        raise UserError(
            "loss.single_step=false: nothing would tell of a token itself, as its return begins with the next one; "
            "type rollout.from_next=false."
        )
    as_drawn = name_of(tau) == "fixed" and tau["tau"] == tau["student_tau"] == 1
    if loss == "minillm" and source_of(settings) != "none" and not as_drawn:
        raise UserError("loss=minillm compares what was drawn at temperature 1; leave temperature out.")
    if name_of(settings["routing"]) == "uncertainty" and loss != "atkd":
        raise UserError(f"routing=uncertainty tells loss=atkd which tokens are hard, and this is loss={loss}; type "
                        "loss=atkd, or routing=none.")  # fmt: skip


# Where the gradient is linear in the teacher's probabilities: options, with the settings that make them so.
LINEAR = {
    "loss": {"fkl": {}, "nll": {}, "jsd": {"beta": 0}, "akl": {"mu": 1}, "skl": {"alpha": 0},
             "distillm2": {"alpha": 0, "beta": 0}},
    "temperature": {"fixed": {"tau": 1}, "entropy": {"tau": 1, "theta": 0}, "wttm": {"tau": 1}},
    "target": {"renormalise": {}},
}  # fmt: skip


def is_unbiased(settings: Settings) -> bool:
    """Whether the gradient on a random sample of the teacher's tokens has the mean of that on the whole teacher.

    The sample's mean is the teacher, so the gradient has to be linear in the teacher's probabilities.
    """
    return not _not_linear(settings)


def _not_linear(settings: Settings) -> list[str]:
    """The words for what makes the gradient not linear in the teacher's probabilities."""
    if name_of(settings["loss"]) == "minillm" and not settings["loss"]["single_step"]:
        return []  # does not read the distribution
    words = []
    for group, options in LINEAR.items():
        node, name = settings[group], name_of(settings[group])
        others = [f"{group}.{k}={node[k]}" for k, value in options.get(name, {}).items() if node[k] != value]
        if others or name not in options:
            words += [f"{group}={name}", *others]
    return words


def check_sampling(settings: Settings) -> None:
    """Raise UserError for a random sample of the teacher's tokens whose gradient is biased, unless that is accepted."""
    cut = settings["truncation"]
    if source_of(settings) == "none" or name_of(cut) != "random" or cut["biased"] or is_unbiased(settings):
        return
    raise UserError(
        f"truncation=random with {' '.join(_not_linear(settings))}: the gradient is biased, as it is not linear in the "
        "teacher's probabilities, so its mean over the draws is not that of the whole teacher. Unbiased are loss=fkl "
        "and loss=nll at temperature.tau=1 with target=renormalise. Take one of these, or truncation=top_p_k, or type "
        "truncation.biased=true to train on the biased gradient."
    )


def check_lm(settings: Settings) -> None:
    """Raise UserError where there is no plain text beside what is distilled."""
    how = source_of(settings)
    if settings["lm"] == "plain" and how in ("none", "cotrained"):
        why = "nothing of the instructions would be learned" if how == "none" else "the teacher learns from one text"
        raise UserError(f"lm=plain with logits={how}: {why}; leave it out, or type logits=online.")
    if settings["lm"] == "plain" and not of_instructions(settings):
        raise UserError("lm=plain takes plain text beside instructions, and this data is plain text; leave it out.")


def check_teacher(settings: Settings) -> None:
    """Raise UserError where a teacher cannot be fine-tuned as asked."""
    of = settings["teacher"]
    if not of.get("sft"):
        return
    if not of["name"]:
        raise UserError(
            "teacher.sft=true needs a teacher by name: teacher=hub teacher.name=… (a size is always fine-tuned)."
        )
    if not of_instructions(settings):
        raise UserError(
            "teacher.sft=true fine-tunes on instructions, and this data is plain text; type data=instructions."
        )
    if source_of(settings) == "cotrained":
        raise UserError("teacher.sft=true with logits=cotrained: that teacher learns on the way; leave it out.")


def check_rollout(settings: Settings) -> None:
    """Raise UserError where nobody could write, or what is written would not be learned."""
    name, how, loss = name_of(settings["rollout"]), source_of(settings), name_of(settings["loss"])
    if name == "none":
        return
    if name == "mixed" and loss != "minillm":
        raise UserError(
            f"rollout=mixed says what its text is worth to loss=minillm, and this is loss={loss}; type loss=minillm, "
            "or rollout=student."
        )
    if name == "adaptive":
        least, most = settings["trainer"]["batch"], settings["rollout"]["capacity"]
        check("rollout.capacity", most, most >= least, f"at least a batch, {least} rows")
    said = f"rollout={name}"
    if not of_instructions(settings):
        raise UserError(f"{said} writes responses to prompts, and this data is plain text; type data=instructions.")
    if how in ("offline", "cotrained"):
        why = "a store knows nothing of new text" if how == "offline" else "the teacher would write while it learns"
        raise UserError(f"{said} with logits={how}: {why}; type logits=online.")
    if how == "none" and name != "teacher":
        raise UserError(f"{said} would do nothing, as logits=none learns from the data alone; type logits=online.")
    if not any(settings["teacher"][k] for k in ("size", "name")):
        raise UserError(f"{said} needs a teacher; type teacher=1m.")
    if name_of(settings["routing"]) == "entropy" and name != "teacher":
        raise UserError(
            f"{said} with routing=entropy: tokens that are not distilled are learned as text, and this text is the "
            "student's own. Leave routing out."
        )
    if settings["rollout"].get("engine") == "vllm" and settings["trainer"]["devices"] > 1:
        raise UserError("rollout.engine=vllm writes in one process; type trainer.devices=1, or rollout.engine=kd.")
    if settings["record"]:
        raise UserError(f"{said} and record: a store is of the text of the data. Leave one of them out.")


def check_prompts_only(settings: Settings, learns_data: bool) -> None:
    """Raise UserError unless a rollout writes all responses. learns_data: whether alpha is ever below 1."""
    name, rollout = name_of(settings["rollout"]), settings["rollout"]
    missing = "This data has prompts and no responses"
    if name not in ("teacher", "pairs", "mixed") and not (name == "student" and rollout["share"] == 1):
        got = f"rollout={name}" + (f" rollout.share={rollout['share']}" if name == "student" else "")
        raise UserError(
            f"{missing}, and {got} learns from the data: need a rollout that writes them all. Type rollout=student "
            "rollout.share=1 alpha.peak=1, or rollout=teacher. If there is a column of responses, name it: "
            "data.prompt=COLUMN data.response=COLUMN."
        )
    if name != "teacher" and learns_data and settings["lm"] == "data":
        raise UserError(
            f"{missing}, and alpha is below 1, so some would be learned as text: type alpha.peak=1, or lm=plain."
        )
    stage = settings["start"]["stage"] == "sft"
    if stage or settings["teacher"]["size"] or settings["teacher"].get("sft"):
        what = "start=sft" if stage else f"teacher.size={settings['teacher']['size']}"
        what = what if stage or settings["teacher"]["size"] else "teacher.sft=true"
        raise UserError(
            f"{missing}, and {what} is fine-tuned on responses. Type teacher=hub teacher.name=NAME_OR_FOLDER, and "
            "start=scratch or start=pretrained."
        )


def check_ranks(settings: Settings) -> None:
    """Raise UserError where the batch, or what is to be done, cannot be shared out among several processes."""
    of = settings["trainer"]
    if of["devices"] > of["batch"]:
        raise UserError(
            f"trainer.devices={of['devices']}: a batch of {of['batch']} rows leaves some without a row; type "
            f"trainer.devices={of['batch']}, or trainer.batch={of['devices']}."
        )
    if of["devices"] > 1 and source_of(settings) == "none" and settings["record"]:
        raise UserError(
            f"trainer.devices={of['devices']}: one process records what a teacher says while it trains; type "
            "trainer.devices=1, or leave record out."
        )
    for option in ("trainer.strategy=fsdp", "trainer.shard_teacher=true"):
        name, value = option.removeprefix("trainer.").split("=")
        if str(of[name]).lower() != value:
            continue
        if of["devices"] == 1:
            raise UserError(f"{option}: there is one process and nothing to share; type trainer.devices=2.")
        check_shards(of, option)
    how = source_of(settings)
    if of["shard_teacher"] and (how == "offline" or (how == "cotrained" and of["strategy"] != "fsdp")):
        why = (
            "no teacher is loaded" if how == "offline" else "it learns as the student does; type trainer.strategy=fsdp"
        )
        raise UserError(f"trainer.shard_teacher=true would do nothing with logits={how}: {why}. Leave it out.")


def check_shards(of: Settings, option: str) -> None:
    """Raise UserError where the ranks would not ask for the same shards at the same time."""
    if of["batch"] % of["devices"]:
        raise UserError(
            f"{option}: each device needs as many rows as any other, and a batch has {of['batch']}; type "
            f"trainer.batch={of['batch'] // of['devices'] * of['devices']}."
        )
    if of["compile"]:
        raise UserError(f"{option}: trainer.compile=true is not made for models in shards; leave it out.")


def name_of(node: Settings) -> str:
    """What a node stands for, such as fkl for a loss."""
    return node["_target_"].rpartition(".")[2]


def of_instructions(settings: Settings) -> bool:
    """Whether the text is prompts and responses."""
    return name_of(settings["data"]) == "instructions"


def is_pretrained(settings: Settings) -> bool:
    """Whether the student starts from weights that were trained before, so that its loss before training is of use."""
    return bool(settings["student"]["name"]) or settings["start"]["stage"] != "scratch"


def source_of(settings: Settings) -> str:
    """none, online, cotrained or offline, from which recorded differs only in how its store is made."""
    name = name_of(settings["logits"])
    return "offline" if name == "recorded" else name


def is_recorded(settings: Settings) -> bool:
    """Whether the store is what a teacher said while it was trained, made on demand."""
    return name_of(settings["logits"]) == "recorded"


def kept_of(node: Settings) -> dict:
    """A truncation as {"name": …, setting: value}; not where it is recorded, nor what is accepted of losses."""
    settings = {k: v for k, v in node.items() if k not in ("_target_", "path", "biased")}
    return {"name": name_of(node), **settings}


def stored_part(settings: Settings) -> dict:
    """What the store keeps that these settings write."""
    return kept_of(settings["record"] or settings["truncation"])


def tokenizer_name(settings: Settings) -> str | None:
    """The pretrained tokenizer to use: the one asked for, else that of a pretrained model; None trains one."""
    return settings["data"]["tokenizer"] or settings["student"]["name"] or settings["teacher"]["name"]


# Settings without a meaning under logits=none.
NO_SIGNAL = ("loss", "truncation", "target", "temperature", "routing", "alpha")


def group_of(word: str) -> str:
    """The config group that an override is about: loss for loss=akl, ++loss.mu=1 and ~loss."""
    return word.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]
