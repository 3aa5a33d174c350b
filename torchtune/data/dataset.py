"""A data set by its options: opened, recognised and ready to be checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from torchtune.data.messages import ROLES
from torchtune.data.options import DataSource
from torchtune.data.prepare import Prepared, prepare
from torchtune.data.reading import Reading
from torchtune.data.recognise import recognise
from torchtune.data.renderer import Renderer
from torchtune.data.rows import LeftOut, Rows, Transform, open_rows
from torchtune.data.template import choose_template
from torchtune.errors import DataError, did_you_mean
from torchtune.tokenizers.tokenizer import Tokenizer

FIRST_ROWS = 100


@dataclass(frozen=True)
class Dataset:
    """Rows, and what turns them into samples."""

    rows: Rows
    renderer: Renderer
    options: DataSource

    def prepare(
        self,
        rows: Rows | None = None,
        *,
        max_seq_len: int | None,
        together: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Prepared:
        """Check all rows, or the given choice of them (`rows.select`), as they will be trained on; see `prepare`."""
        return prepare(
            self.rows if rows is None else rows,
            self.renderer,
            max_seq_len=max_seq_len,
            too_long=self.options.too_long,
            on_bad_row=self.options.on_bad_row,
            check_all=self.options.verify == "all",
            together=together,
            progress=progress,
        )


def open_dataset(
    options: DataSource,
    tokenizer: Tokenizer,
    chat_template: str | Mapping[str, str] | None,
    *,
    stop_tokens: Collection[str] = (),
    now: datetime | None = None,
    transform: Transform | None = None,
) -> Dataset:
    """Open files and tell what their rows are; nothing is rendered yet.

    Args:
        tokenizer: the checkpoint's.
        chat_template: the checkpoint's, one or several by name. `options.chat_template` overrides it.
        stop_tokens: texts of the tokens on which the checkpoint's generation stops.
        now: the time that the template is told.
        transform: what `options.transform` names, built.
    Raises:
        DataError: a file, a column, a role or a template is not what it should be.
    """
    for name, role in options.roles.items():
        if role not in ROLES:
            raise DataError(f"dataset.roles: {name} is to be '{role}', which is no role{did_you_mean(role, ROLES)}")
    rows = open_rows(options.path, limit=options.limit, how=options.how, transform=transform)
    renderer = Renderer(
        tokenizer,
        choose_template(options.chat_template, chat_template),
        reading=read_as(rows, options),
        train_on=options.train_on,
        special_tokens_in_content=options.special_tokens_in_content,
        template_variables=options.chat_template_kwargs,
        stop_tokens=stop_tokens,
        now=now,
        on_prompt_mismatch=options.on_prompt_mismatch,
    )
    return Dataset(rows, renderer, options)


def read_as(rows: Rows, options: DataSource) -> Reading:
    """How the rows are read: told from the first one that says something."""
    first: DataError | None = None
    for index in range(min(len(rows), FIRST_ROWS)):
        try:
            row = rows[index]
        except LeftOut:
            continue
        except DataError as error:
            first = first or error
            if options.on_bad_row == "error":
                raise
            continue
        try:
            schema = recognise(row.record, format=options.format, columns=options.columns)
        except DataError as error:
            first = first or DataError(error.problem, source=row.source)
            if options.on_bad_row == "error":
                raise first from error
            continue
        if schema is not None:
            return Reading(schema, options.roles, options.system == "fold", options.merge_turns)
    if first is not None:
        raise first
    raise DataError(
        "the first rows are all empty" if len(rows) > FIRST_ROWS else "all rows are empty", source=rows.name
    )
