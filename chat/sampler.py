"""How the next token is chosen on llama.cpp: `Sampler(sampling, seed, model).sample(context, row)`.

A part of the fence around llama-cpp-python, with chat/llama.py.
"""

import ctypes
import functools

import numpy as np
from llama_cpp import llama_cpp as C

from chat.engine import GenerationFailed, Sampling
from chat.llama import Context, Model
from chat.prompt import END_THINK, THINK

PENALTY_WINDOW = 256  # last tokens that a repetition penalty looks at


class Sampler:
    """One stream's chain: repetition penalty, temperature, top-k, top-p, min-p, then a draw from its own seed, or the best.

    With a schema the answer is held to it. Raises BadRequest where it cannot be.
    """

    def __init__(self, sampling: Sampling, seed: int, model: Model) -> None:
        self._form = _Form(model, sampling.schema, sampling.thinking) if sampling.schema is not None else None
        chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        add = functools.partial(C.llama_sampler_chain_add, chain)
        if sampling.repetition_penalty != 1.0:
            add(C.llama_sampler_init_penalties(model.vocabulary, PENALTY_WINDOW, sampling.repetition_penalty, 0.0, 0.0))
        if sampling.temperature == 0.0:
            add(C.llama_sampler_init_greedy())
        else:
            add(C.llama_sampler_init_temp(sampling.temperature))
            if sampling.top_k:
                add(C.llama_sampler_init_top_k(sampling.top_k))
            if sampling.top_p < 1.0:
                add(C.llama_sampler_init_top_p(sampling.top_p, 1))
            if sampling.min_p > 0.0:
                add(C.llama_sampler_init_min_p(sampling.min_p, 1))
            add(C.llama_sampler_init_dist(seed))
        self._chain = chain

    def sample(self, context: Context, row: int) -> int:
        """Choose a token from the logits of a batch's row, and remember it for the penalty."""
        if self._form is None:
            return C.llama_sampler_sample(self._chain, context._context, row)
        token = self._form.draw(self._chain, C.llama_get_logits_ith(context._context, row))
        self.accept(token)
        return token

    def accept(self, token: int) -> None:
        C.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        if self._form:
            self._form.close()
            self._form = None
        if self._chain:
            C.llama_sampler_free(self._chain)
            self._chain = None


class _Form:
    """Holds an answer to a schema, from the first token that is not thought. The end comes only when the JSON is whole.

    A grammar that is told a token it forbids throws through C and ends the process, so only what passed it is told to it.
    Asking it about all 151,936 words of Qwen3 takes 17 ms, so the chain draws first and the grammar judges that one token;
    only where it says no are all words judged and another drawn.
    """

    def __init__(self, model: Model, schema: str, thinking: bool) -> None:
        self._model, self._schema = model, schema
        self._thought = "may begin" if thinking else "none"
        self._grammar = model.grammar(schema)

    def draw(self, chain: ctypes.c_void_p, logits: object) -> int:
        """One token from `vocabulary` logits. Raises GenerationFailed where no word of the model goes on with the JSON."""
        model, at = self._model, np.ctypeslib.as_array(logits, shape=(self._model.vocabulary,))
        if self._thought != "none":
            at[list(model.end_tokens)] = -np.inf  # a thought alone is no answer
            token = self._candidates(at).pick(chain)
            if self._thought == "may begin":
                self._thought = "goes on" if token == model.added.get(THINK) else "none"
            elif token == model.added.get(END_THINK):
                C.llama_sampler_free(self._grammar)
                self._thought, self._grammar = "none", model.grammar(self._schema, behind_thought=True)
                return token
            if self._thought == "goes on":
                return token
        token = self._candidates(at).pick(chain)
        one = _Candidates(np.array([token], np.int32), np.zeros(1, np.float32))
        one.apply(self._grammar)
        if not one.possible():
            every = self._candidates(at)
            every.apply(self._grammar)
            if not every.possible():
                raise GenerationFailed("The model has no word that goes on with this JSON: change the schema.")
            token = every.pick(chain)
        C.llama_sampler_accept(self._grammar, token)
        return token

    def close(self) -> None:
        C.llama_sampler_free(self._grammar)

    def _candidates(self, logits: np.ndarray) -> "_Candidates":
        return _Candidates(np.arange(len(logits), dtype=np.int32), logits)


class _Candidates:
    """Token ids (int32) and their logits (float32), one-dimensional and of one length, as llama.cpp's samplers take them."""

    def __init__(self, ids: np.ndarray, logits: np.ndarray) -> None:
        self._rows = np.zeros(len(ids), dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._rows["id"], self._rows["logit"] = ids, logits
        first = self._rows.ctypes.data_as(C.llama_token_data_p)
        self._array = C.llama_token_data_array(data=first, size=len(ids), selected=-1, sorted=False)

    def apply(self, sampler: ctypes.c_void_p) -> None:
        C.llama_sampler_apply(sampler, ctypes.byref(self._array))

    def possible(self) -> bool:
        return bool((self._rows["logit"][: self._array.size] > float("-inf")).any())

    def pick(self, chain: ctypes.c_void_p) -> int:
        self.apply(chain)
        assert 0 <= self._array.selected < self._array.size, "the chain ends with a choice"
        return self._array.data[self._array.selected].id
