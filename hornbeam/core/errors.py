"""The errors that cross folder borders, and what each one means to a user.

Everything a user can cause is a `ValueError`; nothing here knows HTTP beyond a status number,
which `serve` copies into the response.

    HornbeamError
    ├── BadRequest (ValueError)       the client's mistake in one request: 400, names the field
    ├── ConfigError (ValueError)      the operator's mistake: flags, checkpoint, machine
    ├── FamilyUnavailable             a model family exists but cannot be used here, and why
    ├── Overloaded                    the server has to refuse for now: 503
    └── EngineDead                    the engine process ended; nothing can be served: 503
"""


class HornbeamError(Exception):
    """Base of every error that Hornbeam raises on purpose."""

    status = 500


class BadRequest(HornbeamError, ValueError):
    """A request that can never be served as sent. `field` is the offending JSON field, if one is."""

    status = 400

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ConfigError(HornbeamError, ValueError):
    """A flag, a checkpoint or a machine that cannot work. The message says what to change."""


class FamilyUnavailable(HornbeamError):
    """Family `family` claims the model but cannot serve it, because of `cause`."""

    def __init__(self, family: str, cause: BaseException | str) -> None:
        super().__init__(f"model family {family!r} is unavailable: {cause}")
        self.family = family
        self.cause = cause


class Overloaded(HornbeamError):
    """No room now; the same request may succeed later."""

    status = 503


class EngineDead(HornbeamError):
    """The engine process is gone."""

    status = 503
