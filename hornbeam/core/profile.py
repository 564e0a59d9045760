"""What a profile of a running engine records, and where it goes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """As /start_profile takes them."""

    output_dir: str | None = None  # a folder, made if it is missing; None: one of the system's temporary ones
    num_steps: int | None = None  # steps until it ends by itself; None: until it is ended
    activities: tuple[str, ...] = ("CPU", "GPU")
    with_stack: bool = False
    record_shapes: bool = False
    prefix: str = "hornbeam"  # of the file's name
