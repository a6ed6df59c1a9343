"""Whether a corpus goes on where a store ends. Pure: the driver reads the store and carries out the plans."""

from __future__ import annotations

from pipelines.corpus.plan import Plan
from vqmill.places import Where
from vqmill.spec import StoreSpec
from vqmill.writer import refuse_other_store


def stages(found: StoreSpec | None, plan: Plan) -> list[Plan]:
    """The plans to carry out, one after the other, each with a finished store at its end.

    The corpus is cut where the store's segments end, so that what is encoded already lies in the same input shards as before. One
    plan is enough, but for an unfinished store whose own plan ends inside a bundle of the corpus: that cut would not be recorded,
    so this plan is finished first, as a segment.

    Args:
        found: the store that is there, if there is one.
        plan: the corpus of now.
    """
    if found is None or not found.segments:
        return [plan]
    totals = [segment.num_samples for segment in found.segments]
    cut = plan.cut_at(totals)
    is_cut = cut.digest != plan.cut_at(totals[:-1]).digest
    if is_cut and not found.complete and _begins_alike(found, cut):
        return [cut.first(found.segments[-1].input_shards), cut]
    return [cut]


def grows(found: StoreSpec, plan: Plan) -> bool:
    """Whether a plan, cut as the store's segments are, has the store's as a true beginning, and labels keep their meaning."""
    return _goes_on(found, plan) and len(plan.shards) > found.segments[-1].input_shards


def require_same_job(store: Where, found: StoreSpec, wanted: StoreSpec, plan: Plan) -> StoreSpec:
    """What this job must find at the store's place, to go on with it or to append to it.

    Args:
        store: its folder or address.
        found: what is there.
        wanted: what the job would write into a new store.
        plan: its plan, from `stages`.

    Raises:
        UsageError: the store is another one; the differences are shown.
    """
    same = wanted.with_plan_of(found) if _goes_on(found, plan) else wanted
    refuse_other_store(store, found, same, _advice(found, plan))
    return same


def _begins_alike(found: StoreSpec, plan: Plan) -> bool:
    if not found.segments:
        return False
    last = found.segments[-1]
    return last.input_shards <= len(plan.shards) and plan.digest_of_first(last.input_shards) == last.plan


def _goes_on(found: StoreSpec, plan: Plan) -> bool:
    return _begins_alike(found, plan) and _first_other_label(found, plan) is None


def _first_other_label(found: StoreSpec, plan: Plan) -> int | None:
    """The first label of the store that names another class in the plan."""
    names = list(found.corpus.get("class_names", ()))
    return next(
        (label for label, name in enumerate(names) if [name] != list(plan.class_names[label : label + 1])), None
    )


def _advice(found: StoreSpec, plan: Plan) -> str:
    end = "Choose another --out, or repeat the settings it was made with."
    origin = found.corpus.get("description")
    if not origin:
        return end
    label, held = _first_other_label(found, plan), found.segments[-1].num_samples
    if _goes_on(found, plan):
        reason = ""
    elif _begins_alike(found, plan):
        reason = f"Label {label} means {found.corpus['class_names'][label]!r} there, and must go on to do so. "
    elif plan.num_samples < held:
        reason = (
            f"It has more than this corpus: {held:,} samples, here are {plan.num_samples:,}; name the whole corpus, "
            "and no smaller --limit. "
        )
    else:
        reason = (
            f"A corpus that is to be appended begins with the same {held:,} samples in the same order: new tars or files sort behind "
            "the old ones, which stay as they are. Separate stores of one tokenizer are joined with: vqmill merge. "
        )
    return f"It was made from {origin}. {reason}{end}"
