"""Long-term memory: segments of the text that are looked up by what they were about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import Count, PositiveFloat, PositiveInt
from titan_lite.models.block import Layer
from titan_lite.models.memory.base import Piece
from titan_lite.models.memory.decoding import Decoding
from titan_lite.models.memory.whitening import Whitening
from titan_lite.models.memory.xl import XL, Kept, Recalled, XLMemory, newest
from titan_lite.models.ranks import Ranks
from titan_lite.parallel.plan import DEGREE, degree

if TYPE_CHECKING:
    from titan_lite.job import Job


class LongTermMemory(XLMemory):
    """C + N S tokens before each row, in the order of the text: N segments, of which m are shown, and the C last.

    A boundary of segments stays one: each call is over a multiple of S tokens, and drops as many.
    """

    chosen: Tensor
    """(B, m), the segments that are shown, those that are there last."""

    def __init__(
        self,
        config: LongTerm.Config,
        layers: list[Kept],
        valid: Tensor,
        summaries: Tensor,
        whitening: Whitening,
    ):
        super().__init__(config.length, layers, valid, config.reset_on_bos)
        self.near, self.config, self.whitening = config.length, config, whitening
        self.kept = config.kept
        self.recalled = config.recalled
        self.length = self.recalled + self.near
        self.summaries = summaries
        """(B, N + C / S, D) in float32, of every segment that is kept."""

    @torch.no_grad()
    def recall(self) -> None:
        """Chooses what the next call is shown: to be called when everything before it is known."""
        n, m = self.config.segments, self.config.retrieve
        white: Tensor = self.whitening(self.summaries)
        likeness = F.cosine_similarity(white[:, :n], white[:, -1:], dim=-1)  # (B, N)
        missing = torch.arange(n, device=white.device) < n - self.segments_there()[:, None]
        likeness = likeness.masked_fill(missing, -torch.inf)
        self.chosen = likeness.topk(m).indices.flip(-1)

    def segments_there(self) -> Tensor:
        """(B,) segments that are there as a whole."""
        return (self.valid - self.near).clamp(min=0) // self.config.segment

    def there(self) -> Tensor:
        far = self.segments_there().clamp(max=self.config.retrieve) * self.config.segment
        return far + self.valid.clamp(max=self.near)

    def layer(self, index: int) -> Recalled:  # type: ignore[override]  # a tuple has no other bases
        kept = self.layers[index]
        far = kept.segments(self.chosen, self.config.segment)
        return Recalled(far, kept.last(self.near))

    def see(self, x: Tensor) -> None:
        new = x.detach().float().unflatten(1, (-1, self.config.segment)).mean(2)  # (B, T / S, D)
        self._summaries = newest(self.summaries, new, 1)
        self.whitening.count(new)

    def advance(self, documents: Tensor) -> None:
        super().advance(documents)
        self.summaries = self._summaries

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"summaries": self.summaries}


class LongTerm(XL):
    """Beside the last C tokens, queries see m of the N segments of S tokens before those: the likest to the last S.

    A segment's summary is the mean of its tokens' hidden states behind the last layer; likeness is the cosine of
    summaries that were whitened with their running mean and covariance. Before each segment of the training, the m
    segments likest to the newest summary are looked up: a choice that no gradient goes through, made of nothing but
    the row's own past. Their keys stand before those of the C tokens, all at one position, the one before theirs. With
    m = 0 this is `xl`, but that validation and decoding read texts in segments of training.seq_len, as training does.
    Source: the plan of LSWTransformer (github.com/Avelina9X/memory-transformer-pt4), which has no code for it; whitened
    summaries: arXiv 2103.15316.
    """

    class Config(XL.Config):
        type: Literal["long_term"] = "long_term"  # type: ignore[assignment]
        segment: PositiveInt = 64
        """Tokens S of a segment; divides length, training.seq_len and validation.seq_len."""
        segments: PositiveInt = 64
        """Segments N that are kept."""
        retrieve: Count = 4
        """Segments m that queries see."""
        decay: Annotated[float, Field(gt=0, le=1)] = 0.99
        """What a step's summaries weigh in mean and covariance, compared with those of the step after it."""
        eps: PositiveFloat = 1e-5
        """Added to the variances of the covariance's principal axes."""

        @property
        def kept(self) -> int:
            return self.length + self.segments * self.segment

        @property
        def recalled(self) -> int:
            """Tokens of the segments that are shown."""
            return self.retrieve * self.segment

        def keys(self, seq_len: int) -> int:
            return self.recalled + super().keys(seq_len)

        def span(self, seq_len: int) -> int:
            return super().span(seq_len) + (self.retrieve > 0)

        def statistics(self, dim: int) -> nn.Module:
            return Whitening(dim, self.decay, self.eps)

        def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
            lengths = {"model.memory.length": self.length, "training.seq_len": job.training.seq_len}
            if job.validation.enable:
                lengths["validation.seq_len"] = job.validation.seq_len
            for key, tokens in lengths.items():
                if tokens % self.segment:
                    why = (
                        f"must divide {key} = {tokens}: what falls out of memory, and what comes in, are whole segments"
                    )
                    yield Problem(CROSS_FIELD, ".segment", why, self.segment, f"a divisor of {tokens}")
            if degree(job) > 1:
                why = f"sums up whole segments, but with {DEGREE} = {degree(job)} each rank has some of the tokens"
                yield Problem(CROSS_FIELD, ".type", why, self.type, f'"xl", or {DEGREE} = 1')
            if self.retrieve > self.segments:
                why = f"is more than there are: model.memory.segments = {self.segments}"
                yield Problem(CROSS_FIELD, ".retrieve", why, self.retrieve, f"at most {self.segments}")

        def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
            return ()

    config: Config

    def __init__(
        self,
        config: Config,
        layers: list[Layer],
        dim: int,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks,
        summaries: nn.Module,
    ):
        super().__init__(config, layers, dim, device, dtype, ranks, summaries)
        assert isinstance(summaries, Whitening)
        self.layers, self.dim, self.ranks, self.whitening = layers, dim, ranks, summaries

    def others(self, **changes: bool) -> LongTerm:
        """The empty memory of other rows, for weights that stay: nothing has to be made anew."""
        config = self.config.model_copy(update={"recompute_kv": False, **changes})
        return LongTerm(config, self.layers, self.dim, self.device, self.dtype, self.ranks, self.whitening)

    def reading(self, tokens: Tensor, targets: Tensor, documents: Tensor, seq_len: int) -> Iterator[Piece]:
        lanes, numbers = self.others(), torch.arange(len(tokens))
        before = torch.zeros_like(documents[:, :1])
        for parts in zip(*(part.split(seq_len, dim=1) for part in (tokens, targets, documents)), strict=True):
            memory = lanes.of(numbers)
            piece = Piece(parts[0], parts[1], parts[2] - before, memory)
            yield piece
            memory.advance(piece.documents)
            before = parts[2][:, -1:]

    def decoding(self, seq_len: int) -> Decoding:
        return Decoding(self.others(reset_on_bos=False).of(torch.arange(1)), seq_len)

    def of(self, rows: Tensor) -> LongTermMemory:
        memory = super().of(rows)
        assert isinstance(memory, LongTermMemory)
        memory.recall()
        return memory

    def empty(self, n_rows: int, device: torch.device | None = None) -> dict[str, Tensor]:
        n_segments = self.config.kept // self.config.segment
        summaries = torch.zeros(n_rows, n_segments, self.dim, dtype=torch.float32, device=device or self.device)
        return super().empty(n_rows, device) | {"summaries": summaries}

    def slot(self, parts: Mapping[str, Tensor], layers: list[Kept]) -> LongTermMemory:
        return LongTermMemory(self.config, layers, parts["valid"], parts["summaries"], self.whitening)
