"""Parts of conversations: numbers worked by hand, and nothing unknown ever counted as nought."""

from engine.text.frames import Part, add, count_parts, typescript
from engine.text.request import Request

FRAME = (3, 1, 3)
HELLO = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]


def words(text: str) -> int:
    """A tokenizer that can be checked in the head."""
    return len(text.split())


def count(messages, tools=(), frame=FRAME, model="gpt-4o", exact=True):
    request = Request(messages, tuple(tools))
    return count_parts(request, model, words, exact=exact, frame=frame)


def total(parts):
    return sum(part.tokens or 0 for part in parts)


def test_frames_by_hand():
    parts = count(HELLO)
    assert parts == [
        Part("content", 3, "exact"),
        Part("frame", 2 * 3 + 2, "frame rule"),  # the roles are words too
        Part("primer", 3, "frame rule"),
    ]
    named = [{**HELLO[0], "name": "Ada"}, HELLO[1]]
    assert total(count(named)) - total(parts) == 2, "one for the name, one for its word"


def test_what_is_not_published_is_unknown():
    parts = count(HELLO, frame=None, exact=False)
    assert Part("content", 3, "estimated") in parts and Part("frame", None, "unknown") in parts
    sound = [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]
    assert Part('"input_audio"', None, "unknown") in count(sound)


def test_pictures():
    def picture(**given):
        return [{"role": "user", "content": [{"type": "image_url", "image_url": given}]}]

    assert Part("images", 85, "frame rule") in count(picture(url="https://x", detail="low"))
    assert Part("images", None, "unknown") in count(picture(url="https://x"))
    both = picture(url="https://x", detail="low") + picture(url="https://x")
    assert [p.tokens for p in count(both) if p.kind == "images"] == [85, None]


def test_tools_become_typescript():
    tool = {
        "name": "weather",
        "description": "Look outside.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where."},
                "unit": {"enum": ["C", "F"]},
                "days": {"type": "array", "items": {"type": "integer"}},
                "more": {"type": "object", "properties": {"deep": {"type": ["string", "null"]}}},
                "any": {},
            },
            "required": ["city"],
        },
    }
    text = typescript([{"type": "function", "function": tool}, {"name": "stop"}])
    for line in (
        "// Look outside.",
        "type weather = (_: {",
        "city: string,",
        'unit?: "C" | "F",',
        "days?: number[],",
        "deep?: string | null,",
        "any?: any,",
        "}) => any;",
        "type stop = () => any;",
    ):
        assert line in text.split("\n"), text
    assert Part("tools", words(text), "estimated") in count(HELLO, [tool, {"name": "stop"}])


def test_hostile_tools_count_as_something():
    for tool in ({}, {"function": 3}, {"parameters": {"properties": [1], "required": 1}}):
        assert count(HELLO, [tool])
    for schema in ({"properties": {"a": 1}, "required": 2}, {"properties": {"a": {"type": {}}}}):
        tool = {"name": "f", "parameters": schema}
        assert count(HELLO, [tool])
    calls = [{"role": "assistant", "content": None, "tool_calls": [7, {"function": {"name": "f"}}]}]
    assert Part("tools", 2, "estimated") in count(calls)


def test_adding_up_keeps_the_classes_apart():
    parts = [Part("images", 1, "frame rule"), Part("images", None, "unknown")]
    assert add(parts * 2) == [Part("images", 2, "frame rule"), Part("images", None, "unknown")]
