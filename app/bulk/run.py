"""A run, from the options to the summary."""

import argparse
import time
from contextlib import closing

from app.bulk.addresses import Output, absolute, filesystem, is_remote, reaches, require_utf8
from app.bulk.listing import write_listing
from app.bulk.on_ray import score_on_ray
from app.bulk.plan import Counts, Model, Options, Plan, PlanError, alone, begin, find_model
from app.bulk.processes import default_processes, default_threads, score_here
from app.bulk.progress import Progress, summary
from app.settings import Settings


def run(options: argparse.Namespace, settings: Settings) -> str:
    """Do what is not done yet of a run; gives the summary.

    Args:
        options: as `app.bulk.__main__` reads them.
        settings: the server's.

    Raises:
        PlanError: OUT cannot be that of this run.
        InterflowError: the input, the model or a worker; what was done is kept.
    """
    output = Output(absolute(options.out))
    asked = plan_of(options, settings)
    for given in asked.inputs:
        if reaches(given, output.address):
            raise PlanError(f"{output.address} lies within {given}, whose images are read. Name a folder beside it.")
    for address in (*asked.inputs, output.address):
        if is_remote(address):
            filesystem(address)  # before anything is done
    with alone(output):
        plan = begin(output, asked)
        began = time.monotonic()
        if plan.listed is None:
            progress = Progress("listing")
            plan = plan.model_copy(update={"listed": write_listing(output, plan, progress.add)})
            progress.close()
            plan.write(output)
        assert plan.listed is not None, "it was just listed"  # noqa: S101 - mypy cannot see it
        if plan.done is not None:
            return summary(plan, plan.done, 0, 0)
        done, made = _score(plan, output, options, settings)
        if done.images != plan.listed.images:
            raise PlanError(
                f"{output.address}: {plan.listed.images} images were listed, but its tables hold {done.images}. Files "
                "of it were changed; begin anew in another folder."
            )
        plan = plan.model_copy(update={"done": done})
        plan.write(output)
        return summary(plan, done, made, time.monotonic() - began)


def plan_of(options: argparse.Namespace, settings: Settings) -> Plan:
    """What the options ask for.

    Raises:
        ModelError, CardError: there is no such model.
        AddressError: an input that cannot be meant, or a name that is not UTF-8.
    """
    card = find_model(settings, options.model, options.version)
    folder = str(settings.exports.absolute() / card.name / card.version)
    for name in (folder, options.column or ""):
        require_utf8(name)
    return Plan(
        inputs=tuple(absolute(given) for given in options.inputs),
        column=options.column,
        model=Model(
            name=card.name,
            version=card.version,
            sha256=card.provenance.weights_sha256,
            precision=card.precision,
            folder=folder,
        ),
        options=Options(
            top_k=options.top_k,
            part_images=options.part_images,
            max_bytes=settings.max_bytes,
            max_pixels=settings.max_pixels,
            cuda_tf32=settings.cuda_tf32,
        ),
    )


def _score(plan: Plan, output: Output, options: argparse.Namespace, settings: Settings) -> tuple[Counts, int]:
    """Counts of all images, and how many had to be answered."""
    assert plan.listed is not None, "the listing is finished"  # noqa: S101 - `run` did that
    threads = default_threads(plan, settings) if options.threads is None else options.threads
    if options.ray is None:
        processes = options.processes or default_processes(settings)
        parts = score_here(plan, output, settings, processes, threads)
    else:
        parts = score_on_ray(
            plan,
            output,
            settings,
            address=options.ray or None,
            processes=options.processes,
            threads=threads,
            gpus=options.gpus,
        )
    done, made = Counts(), 0
    progress = Progress("scoring", plan.listed.images)
    with closing(parts):  # a signal ends the workers, too
        for counts, fresh in parts:
            done = done.plus(counts)
            made += counts.images if fresh else 0
            progress.add(counts.images, fresh)
    progress.close()
    return done, made
