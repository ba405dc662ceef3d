"""Which images' rows are on the device, and how many may be made in a step. Pure Python.

Rows are counted as tokens: those of one image stand for as many of its prompt. The bookkeeping is
here; the runner stores what it is told to keep.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Set
from collections.abc import Sequence as SequenceOf

from octavo.core import ImageInput, Picture, Sequence
from octavo.errors import CapacityError, IntegrityError
from octavo.scheduler.constraints import Constraint


class ImageCache:
    """The contents whose rows the runner has. Sole writer: the scheduler, through `ImageBudget`.

    At most `max_num_tokens` rows are kept; the least recently used go first, but never those of an
    image that somebody has computed a part of. With 0 there are no images.
    """

    def __init__(self, max_num_tokens: int = 0):
        self.max_num_tokens = max_num_tokens
        self.num_tokens = 0
        self._rows: OrderedDict[str, int] = OrderedDict()  # the one that was used last at the end
        self._forgotten: dict[str, None] = {}  # the runner has not been told yet, as below
        self._pictures: dict[str, Picture] = {}
        self._is_stale = False  # what is kept is not to be found any more

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def check(self, images: Iterable[ImageInput]) -> None:
        """Refuse what could never be encoded.

        Raises:
            CapacityError: an image of more rows than may be kept.
        """
        for image in images:
            if image.num_tokens > self.max_num_tokens:
                raise CapacityError(
                    f"an image or a video of {image.num_tokens} tokens is larger than the memory "
                    f"for images, which holds {self.max_num_tokens}: send a smaller one, or raise "
                    "encoder_cache_memory_bytes",
                    param="messages",
                )

    def num_tokens_beside(self, pinned: Iterable[str]) -> int:
        """Room for rows, if all but those of `pinned` go."""
        return self.max_num_tokens - sum(self._rows[key] for key in pinned)

    def use(self, key: str) -> None:
        """It is the one that was used last."""
        self._rows.move_to_end(key)

    def keep(self, image: ImageInput, picture: Picture, *, pinned: Set[str]) -> None:
        """Have the runner encode a picture with the next step, and drop others where it must."""
        for key in [key for key in self._rows if key not in pinned]:
            if self.num_tokens + image.num_tokens <= self.max_num_tokens:
                break
            self._drop(key)
        self._rows[image.key] = image.num_tokens
        self.num_tokens += image.num_tokens
        self._pictures[image.key] = picture

    def take_changes(self) -> tuple[tuple[str, ...], tuple[Picture, ...]]:
        """(contents to forget, pictures to encode after that) since the last time."""
        changes = tuple(self._forgotten), tuple(self._pictures.values())
        self._forgotten, self._pictures = {}, {}
        return changes

    def lose(self, keys: Iterable[str]) -> None:
        """The runner may lack these, or still have them: nobody must count on either."""
        for key in keys:
            self._forgotten[key] = None
            if key in self._rows:
                self._drop(key)

    def forget_all(self) -> None:
        """Let the next step begin with nothing but what those who run have computed a part of."""
        self._is_stale = True

    def begin_step(self, pinned: Set[str]) -> None:
        """A step is planned, in which these must stay."""
        if self._is_stale:
            self.lose([key for key in self._rows if key not in pinned])
            self._is_stale = False

    def check_integrity(self) -> None:
        """Recount the rows; raise `IntegrityError` on any difference."""
        if self.num_tokens != sum(self._rows.values()) or self.num_tokens > self.max_num_tokens:
            raise IntegrityError(f"{self.num_tokens} rows of images are not what is kept")
        if not self._pictures.keys() <= self._rows.keys():
            raise IntegrityError("a picture is to be encoded, and its rows are not to be kept")

    def _drop(self, key: str) -> None:
        self.num_tokens -= self._rows.pop(key)
        self._forgotten[key] = None
        self._pictures.pop(key, None)


class ImageBudget(Constraint):
    """No token of an image runs before its rows are there, and a step makes only so many of them.

    An image of more than the budget is encoded in a step of its own. Tokens before an image that
    must wait run now. What a sequence began stays when it is pushed out: the next step pins anew.
    """

    name = "images"

    def __init__(self, cache: ImageCache, max_num_encoder_tokens: int):
        self.cache = cache
        self._max_num_encoder_tokens = max_num_encoder_tokens
        self._num_encoded = 0  # rows that this step makes
        self._pinned: set[str] = set()

    def begin_step(self, running: SequenceOf[Sequence]) -> None:
        self._num_encoded = 0
        self._pinned = {key for key in begun(running) if key in self.cache}
        self.cache.begin_step(self._pinned)

    def allow(self, sequence: Sequence, num_tokens: int) -> int:
        if not sequence.images:
            return num_tokens
        looked_at, num_encoded = set(self._pinned), self._num_encoded
        room = self.cache.num_tokens_beside(looked_at)
        for image in _seen(sequence, num_tokens):
            if image.key in looked_at:
                continue
            looked_at.add(image.key)
            room -= image.num_tokens
            is_over = room < 0
            if image.key not in self.cache:
                num_encoded += image.num_tokens
                is_alone = num_encoded == image.num_tokens
                is_over |= num_encoded > self._max_num_encoder_tokens and not is_alone
            if is_over:
                return max(0, image.start - sequence.num_computed_tokens)
        return num_tokens

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        if not sequence.images:
            return
        seen = {image.key: image for image in _seen(sequence, num_tokens)}
        # Before anything is dropped for a new one: what is there already must stay.
        self._pinned |= {key for key in seen if key in self.cache}
        for key, image in seen.items():
            if key in self.cache:
                self.cache.use(key)
                continue
            self._num_encoded += image.num_tokens
            self.cache.keep(image, sequence.pictures[key], pinned=self._pinned)
            self._pinned.add(key)

    def explain(self, sequence: Sequence) -> str:
        return (
            f"a step makes {self._max_num_encoder_tokens} tokens of images, of which "
            f"{self._num_encoded} are taken; {self.cache.num_tokens} of "
            f"{self.cache.max_num_tokens} are kept"
        )


def cache_of(constraints: Iterable[Constraint]) -> ImageCache:
    """The bookkeeping behind a scheduler's `ImageBudget`; that of no images where it has none."""
    budgets = (one for one in constraints if isinstance(one, ImageBudget))
    return next((budget.cache for budget in budgets), ImageCache())


def begun(running: Iterable[Sequence]) -> Iterator[str]:
    """The images of which somebody has computed some tokens and not all."""
    for sequence in running:
        for image in sequence.images:
            if image.start < sequence.num_computed_tokens < image.end:
                yield image.key


def _seen(sequence: Sequence, num_tokens: int) -> Iterator[ImageInput]:
    """Those that the next `num_tokens` tokens look at."""
    start = sequence.num_computed_tokens
    for image in sequence.images:
        if image.start < start + num_tokens and image.end > start:
            yield image
