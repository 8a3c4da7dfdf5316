"""Draws docs/images/trace.svg from the spans of a stopped chat with a tool: `python docs/images/trace.py`."""

import asyncio
from pathlib import Path

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ollama_async import AbortError, AsyncClient, CancelToken, telemetry
from ollama_async.testing import FakeOllama, Reply

LEFT, TOP, WIDTH, ROW, BAR = 190, 34, 500, 44, 16
PICTURE = Path(__file__).with_suffix(".svg")
SHOWN = ("ollama_async.outcome", "ollama_async.abort.reason", "gen_ai.response.finish_reasons")
STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #1f2328 }
    .small { font-size: 11px; fill: #59636e }
    rect { fill: #3b6fd4; rx: 3 }
    .tool { fill: #2da44e }
    .stopped { fill: #bf8700 }
    line { stroke: #d1d9e0 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .small { fill: #9198a1 } rect { fill: #6f9df5 } .tool { fill: #3fb950 }
      .stopped { fill: #d29922 } line { stroke: #3d444d }
    }
"""


async def spans() -> list[ReadableSpan]:
    """Return the spans of a chat that calls a tool, and is stopped in its second answer."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry.instrument(provider)
    tracer = provider.get_tracer("the program")
    call = {"function": {"name": "weather", "arguments": {"city": "Lima"}}}
    with FakeOllama() as server:
        server.script("/api/chat", Reply.chat("", interval=0.1, tool_calls=[call]), Reply.endless_chat(0.02))
        token = CancelToken()
        async with AsyncClient(server.url) as client:
            with tracer.start_as_current_span("answer the user"):
                asked = [{"role": "user", "content": "What is the weather in Lima?"}]
                answer = await client.chat("llama3.2", asked, stream=True).collect()
                with tracer.start_as_current_span("execute_tool weather"):
                    await asyncio.sleep(0.08)
                asked += [answer.message, {"role": "tool", "tool_name": "weather", "content": "sunny"}]
                try:
                    async for _ in (stream := client.chat("llama3.2", asked, stream=True, token=token)):
                        if len(stream.text) > 50:
                            token.abort("the user pressed Stop")
                except AbortError:
                    pass
    # A span ends in a round of the loop after the abort.
    await asyncio.sleep(0.1)
    telemetry.uninstrument()
    return sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)


def picture(found: list[ReadableSpan]) -> str:
    """Return the picture of a trace: a row for each span."""
    begin = min(span.start_time or 0 for span in found)
    whole = max(span.end_time or 0 for span in found) - begin
    rows = []
    for number, span in enumerate(found):
        start, end = ((moment or 0) - begin for moment in (span.start_time, span.end_time))
        x, length, y = LEFT + WIDTH * start / whole, max(2, WIDTH * (end - start) / whole), TOP + ROW * number
        attributes = dict(span.attributes or {})
        kind = "stopped" if attributes.get(SHOWN[0]) == "aborted" else "tool" if "tool" in span.name else "call"
        told = [f"{name.removeprefix('ollama_async.')} = {attributes[name]}" for name in SHOWN if name in attributes]
        rows += [
            f'<text x="{14 if span.parent is None else 30}" y="{y + 13}">{span.name}</text>',
            f'<rect class="{kind}" x="{x:.0f}" y="{y}" width="{length:.0f}" height="{BAR}"/>',
            f'<text class="small" x="{LEFT}" y="{y + BAR + 14}">{", ".join(told)}</text>',
        ]
    ticks = [
        f'<line x1="{LEFT + WIDTH * part / 4:.0f}" y1="{TOP - 6}" x2="{LEFT + WIDTH * part / 4:.0f}" '
        f'y2="{TOP + ROW * len(found)}"/><text class="small" x="{LEFT + WIDTH * part / 4 - 10:.0f}" '
        f'y="{TOP - 14}">{whole / 1e6 * part / 4:.0f} ms</text>'
        for part in range(5)
    ]
    body = "\n  ".join([*ticks, *rows])
    size = f"0 0 {LEFT + WIDTH + 40} {TOP + ROW * len(found) + 10}"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img" aria-label="A trace">
  <style>{STYLE}  </style>
  {body}
</svg>
"""


if __name__ == "__main__":
    PICTURE.write_text(picture(asyncio.run(spans())))
