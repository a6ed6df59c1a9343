"""Whether a corpus goes on where a store ends, and what a job has to do. Pure but for `planned_job`; the driver carries out the plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.corpus.plan import Plan
from pipelines.retry import SetAside, corpus_totals, retry_plan, tried_again, with_retries
from vqmill.errors import UsageError
from vqmill.places import Place, Where
from vqmill.spec import StoreSpec
from vqmill.store import open_codes
from vqmill.writer import refuse_other_store


def stages(found: StoreSpec | None, plan: Plan, tried: Sequence[SetAside] = ()) -> list[Plan]:
    """The plans to carry out, one after the other, each with a finished store at its end.

    The corpus is cut where the store's segments end, so that what is encoded already lies in the same input shards as before. One
    plan is enough, but for an unfinished store whose own plan ends inside a bundle of the corpus: that cut would not be recorded,
    so this plan is finished first, as a segment. So is one that tries samples again, for it is told apart from growth.

    Args:
        found: the store that is there, if there is one.
        plan: the corpus of now.
        tried: the quarantine lines that the store's retries have taken up.
    """
    if found is None or not found.segments:
        return [plan]
    totals, last = corpus_totals(found.segments), found.segments[-1]
    cut = plan.cut_at(totals)
    is_cut = cut.digest != plan.cut_at(totals[:-1]).digest
    whole = with_retries(cut, found.segments, tried)
    if (
        (is_cut or (last.retries and len(whole.shards) > last.input_shards))
        and not found.complete
        and _begins_alike(found, whole)
    ):
        return [whole.first(last.input_shards), whole]
    return [whole]


@dataclass(frozen=True)
class Job:
    """What `tokenize` does to a place.

    Attributes:
        parts: the plans to carry out, see `stages`.
        retries: quarantine lines that the one plan takes up, when it is a new retry; else 0.
    """

    parts: list[Plan]
    retries: int = 0

    def require_same(self, store: Where, found: StoreSpec, wanted: StoreSpec, plan: Plan) -> StoreSpec:
        """As `require_same_job`; of a new retry the plan is looked at already, and may tell of restored files."""
        if not self.retries:
            return require_same_job(store, found, wanted, plan)
        same = wanted.with_plan_of(found)
        refuse_other_store(store, found, same, _machines(found, same) + _advice(found, plan))
        return same


def planned_job(plan: Plan, out: Place, found: StoreSpec | None, *, retry: bool) -> Job:
    """What is to be done, of a corpus and a store.

    Args:
        plan: the corpus.
        out: the store's place.
        found: what is there.
        retry: whether samples that were set aside are tried again; then nothing is appended.

    Raises:
        UsageError: there is no finished store to retry, or it was made from another corpus.
        CodesError: the store's tables are damaged.
    """
    tried = tried_again(out, found) if found else []
    if not retry:
        return Job(stages(found, plan, tried))
    without = "the same command without --retry-quarantined"
    if found is None:
        raise UsageError(f"{out.name}: no store there whose samples could be tried again. To make it, give {without}.")
    if "copied" in found.corpus or not found.segments:
        raise UsageError(
            f"{out.name}: not made by tokenize, so it is not known where its samples lie. Retry in the stores it was made of, and make it again."
        )
    if not found.complete and not found.segments[-1].retries:
        raise UsageError(
            f"{out.name}: unfinished; samples are tried again in finished stores. To finish it, give {without}."
        )
    if found.complete and (codes := open_codes(out)).quarantine().num_rows:
        _require_same_labels(found, plan)
        return Job([retry_plan(plan, found, tried, codes)], codes.quarantine().num_rows)
    return Job([stages(found, plan, tried)[0].first(found.segments[-1].input_shards)])


def _require_same_labels(found: StoreSpec, plan: Plan) -> None:
    if (label := _first_other_label(found, plan)) is not None:
        raise UsageError(
            f"{plan.corpus}: label {label} means {found.corpus['class_names'][label]!r} in the store, and must go on to do so."
        )


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
    refuse_other_store(store, found, same, _machines(found, same) + _advice(found, plan))
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


def _machines(found: StoreSpec, wanted: StoreSpec) -> str:
    if found.tokenizer.get("computed_on") == wanted.tokenizer.get("computed_on"):
        return ""
    return "Machines of another kind work on it with --allow-mixed. "


def _advice(found: StoreSpec, plan: Plan) -> str:
    end = "Choose another --out, or repeat the settings it was made with."
    origin = found.corpus.get("description")
    if not origin:
        return end
    label, held = _first_other_label(found, plan), corpus_totals(found.segments)[-1]
    if _goes_on(found, plan):
        reason = ""
    elif _begins_alike(found, plan):
        reason = f"Label {label} means {found.corpus['class_names'][label]!r} there, and must go on to do so. "
    elif (here := plan.num_samples - plan.num_retried) < held:
        reason = (
            f"It has more than this corpus: {held:,} samples, here are {here:,}; name the whole corpus, "
            "and no smaller --limit. "
        )
    else:
        reason = (
            f"A corpus that is to be appended begins with the same {held:,} samples in the same order: new tars or files sort behind "
            "the old ones, which stay as they are (when damaged ones were restored, first give --retry-quarantined). Separate stores of one tokenizer are joined with: vqmill merge. "
        )
    return f"It was made from {origin}. {reason}{end}"
