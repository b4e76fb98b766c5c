"""The examples of eSurge's documentation run as they are written there, but for their imports and model.

What a reader copies: no option is left out and no call is changed.
"""

from __future__ import annotations

import asyncio
import builtins
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import engine as ed
from engine import CacheConfig, Config, SchedulerConfig, checkpoints
from tests.tiny_model import make_tiny_checkpoint


@pytest.fixture(scope="module")
def model_id(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that was made for 16,384 tokens, as small as can be."""
    folder = tmp_path_factory.mktemp("examples") / "model"
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_tiny_checkpoint(folder, max_position_embeddings=16384, tie_word_embeddings=False, **shape)


@pytest.fixture(scope="module")
def tokenizer(model_id: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


@pytest.fixture(scope="module")
def model(model_id: str) -> checkpoints.LoadedModel:
    return checkpoints.load(model_id, dtype="float32")


@pytest.fixture(scope="module")
def engine(model: checkpoints.LoadedModel, tokenizer: Any) -> ed.eSurge:
    # Initialize eSurge engine
    return ed.eSurge(
        model=model,
        tokenizer=tokenizer,
        max_model_len=8192,
        max_num_seqs=16,
        hbm_utilization=0.9,
        page_size=64,
    )


def test_basic_usage(engine: ed.eSurge):
    response = engine.generate(
        "What is the meaning of life?",
        sampling_params=ed.SamplingParams(
            max_tokens=100,
            temperature=0.7,
        ),
    )
    text = response[0].outputs[0].text
    assert len(response[0].outputs[0].token_ids) <= 100
    assert text == engine.tokenizer.decode(response[0].outputs[0].token_ids, skip_special_tokens=True)


def test_streaming_generation(engine: ed.eSurge, capsys: pytest.CaptureFixture[str]):
    # Stream tokens as they're generated
    for output in engine.stream(
        "Tell me a story about a robot",
        sampling_params=ed.SamplingParams(
            max_tokens=200,
            temperature=0.8,
        ),
    ):
        print(output.delta_text, end="", flush=True)
    assert capsys.readouterr().out == output.accumulated_text
    assert output.finished


def test_batch_processing(engine: ed.eSurge, capsys: pytest.CaptureFixture[str]):
    prompts = [
        "Explain quantum computing",
        "What is machine learning?",
        "How does the internet work?",
    ]

    # Process multiple prompts
    outputs = engine.generate(
        prompts,
        sampling_params=ed.SamplingParams(
            max_tokens=100,
            temperature=0.7,
        ),
    )

    for output in outputs:
        print(f"Request {output.request_id}: {output.outputs[0].text}")
    assert [output.prompt for output in outputs] == prompts
    assert capsys.readouterr().out.count("Request request-") == 3


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "engine configuration": {
        # Model configuration
        "max_model_len": 16384,
        "max_num_seqs": 32,
        # Memory configuration
        "hbm_utilization": 0.9,
        "page_size": 64,
        # Performance options
        "runner_verbose": False,
        "min_input_pad": 32,
        # Naming
        "esurge_name": "my-engine",
    },
    "advanced configuration": {
        "max_model_len": 8192,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": True,
        "page_size": 16,
        "hbm_utilization": 0.9,
    },
    "TPU optimization": {
        "max_model_len": 8192,
        "max_num_seqs": 64,
        "page_size": 128,
        "use_aot_forward": True,
        "hbm_utilization": 0.95,
    },
    "GPU optimization": {
        "max_model_len": 4096,
        "max_num_seqs": 32,
        "page_size": 64,
        "hbm_utilization": 0.85,
    },
    "memory-constrained settings": {
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "page_size": 32,
        "hbm_utilization": 0.7,
    },
    "prefix caching": {
        "cache_config": CacheConfig(
            enable_prefix_caching=True,
            prefix_cache_capacity=0.3,  # 30% of cache for prefixes
        )
    },
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations(name: str, model: checkpoints.LoadedModel, tokenizer: Any):
    options = CONFIGURATIONS[name]
    # Only when steps are compiled is not as in the documentation: none is run before it is needed.
    engine = ed.eSurge(model=model, tokenizer=tokenizer, compile_runner=False, **options)
    for option, value in options.items():
        if option not in ("cache_config", "esurge_name"):
            assert getattr(engine.config, option) == value
    if name == "prefix caching":
        settings = engine._scheduler.settings
        assert settings.max_cached_pages == int(0.3 * engine.num_pages)
    assert engine.esurge_name == options.get("esurge_name", "model")
    assert engine.config.use_aot_forward
    assert Config().scheduler_config == SchedulerConfig()


# -- the chat application ----------------------------------------------------------------------------


def create_chat_engine(model_id: str):
    """Create an eSurge engine for chat."""
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    tokenizer.pad_token_id = tokenizer.eos_token_id

    model = checkpoints.load(model_id, dtype="float32")

    engine = ed.eSurge(
        model=model,
        tokenizer=tokenizer,
        max_model_len=4096,
        max_num_seqs=16,
        hbm_utilization=0.9,
        page_size=64,
        esurge_name="chat-engine",
    )

    return engine


def chat_loop(engine):
    """Interactive chat loop."""
    conversation = []

    while True:
        user_input = input("\nYou: ")
        if user_input.lower() in ["quit", "exit"]:
            break

        conversation.append({"role": "user", "content": user_input})

        # Format conversation for model
        prompt = format_conversation(conversation)

        # Generate response
        print("Assistant: ", end="", flush=True)
        response_text = ""

        for output in engine.stream(
            prompt,
            sampling_params=ed.SamplingParams(
                max_tokens=200,
                temperature=0.7,
                stop=["</s>", "\n\nYou:"],  # type: ignore[arg-type]
            ),
        ):
            print(output.delta_text, end="", flush=True)
            response_text += output.delta_text

        print()  # New line after response
        conversation.append({"role": "assistant", "content": response_text})


def format_conversation(messages):
    """Format messages for model input."""
    formatted = ""
    for msg in messages:
        role = msg["role"].capitalize()
        formatted += f"{role}: {msg['content']}\n"
    formatted += "Assistant: "
    return formatted


@pytest.fixture(scope="module")
def chat_engine(model_id: str) -> ed.eSurge:
    return create_chat_engine(model_id)


def test_chat_application(
    chat_engine: ed.eSurge, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    said = iter(["Hello", "And then?", "quit"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(said))
    print("Chat engine ready! Type 'quit' to exit.")
    chat_loop(chat_engine)
    assert capsys.readouterr().out.count("Assistant: ") == 2
    assert next(said, None) is None
    assert chat_engine.esurge_name == "chat-engine"
    assert not chat_engine.has_unfinished


# -- the batch processing service --------------------------------------------------------------------


class BatchProcessor:
    """Batch text processing service."""

    def __init__(self, engine: ed.eSurge):
        self.engine = engine
        self.pending_requests = {}

    async def process_batch(
        self,
        texts: list[str],
        sampling_params: ed.SamplingParams | None = None,
    ) -> list[str]:
        """Process a batch of texts."""
        if sampling_params is None:
            sampling_params = ed.SamplingParams(
                max_new_tokens=100,  # type: ignore[call-arg]
                temperature=0.7,
            )

        # Submit all requests
        request_ids = []
        for text in texts:
            request_id = self.engine.add_request(
                prompt=text,
                sampling_params=sampling_params,
            )
            request_ids.append(request_id)
            self.pending_requests[request_id] = None

        # Wait for all completions
        results = {}
        while len(results) < len(request_ids):
            outputs = self.engine.step()

            for output in outputs:
                if output.finished:
                    results[output.request_id] = output.outputs[0].text
                    self.pending_requests.pop(output.request_id, None)

            await asyncio.sleep(0)  # Small delay

        # Return in original order
        return [results[rid] for rid in request_ids]

    async def process_stream(
        self,
        texts: list[str],
        callback=None,
    ):
        """Process texts with streaming callbacks."""
        for text in texts:
            request_id = self.engine.add_request(
                prompt=text,
                sampling_params=ed.SamplingParams(
                    max_new_tokens=100,  # type: ignore[call-arg]
                    temperature=0.7,
                ),
            )

            # Stream this request to completion
            while True:
                outputs = self.engine.step()

                for output in outputs:
                    if output.request_id == request_id:
                        if callback:
                            await callback(output)

                        if output.finished:
                            break
                else:
                    await asyncio.sleep(0)
                    continue
                break


def test_batch_processing_service(chat_engine: ed.eSurge):
    async def main() -> list[str]:
        processor = BatchProcessor(chat_engine)

        # Batch processing
        prompts = [
            "Explain quantum computing in simple terms",
            "What are the benefits of exercise?",
            "How does photosynthesis work?",
        ]

        results = await processor.process_batch(prompts)
        for prompt, result in zip(prompts, results, strict=True):
            print(f"Q: {prompt}\nA: {result}\n")
        assert processor.pending_requests == {}
        return results

    results = asyncio.run(main())
    assert len(results) == 3
    assert not chat_engine.has_unfinished


def test_batch_processing_service_streams(chat_engine: ed.eSurge):
    seen: dict[str, list[Any]] = {}

    async def callback(output: Any) -> None:
        seen.setdefault(output.prompt, []).append(output)

    asyncio.run(BatchProcessor(chat_engine).process_stream(["the answer", "is in"], callback))
    assert list(seen) == ["the answer", "is in"]
    for outputs in seen.values():
        assert outputs[-1].finished
        assert "".join(output.delta_text for output in outputs) == outputs[-1].outputs[0].text
        assert len(outputs) > 3, "the callback sees the text grow"


def test_names_that_are_not_there_are_not_exported():
    names = {"eSurge", "SamplingParams", "Config", "SchedulerConfig", "CacheConfig", "PriorityRequestQueue"}
    assert set(ed.__all__) >= names
    assert all(getattr(ed, name) for name in names)
    assert ed.eSurge is ed.Engine
    with pytest.raises(AttributeError, match="eSurgee"):
        _ = ed.eSurgee
    assert Path(ed.__file__).parent.name == "engine"
