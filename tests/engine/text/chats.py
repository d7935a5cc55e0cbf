"""Chat templates that do what published ones do, written for these tests, and conversations.

Each is named after the family whose features it has: the same tokens, the same constructs of Jinja.
"""

# ruff: noqa: E501 (a template is one text; a line break would be in it)

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from engine.text.settings import Settings
from engine.text.tokenizer import Tokenizer

_CONTROLS = """<s> </s> <unk> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>
<|python_tag|> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS]
[/TOOL_RESULTS] <bos> <eos> <start_of_turn> <end_of_turn> <|user|> <|assistant|> <|system|> <|tool|>
<|end|> <|User|> <|Assistant|> <|begin▁of▁sentence|> <|end▁of▁sentence|> <|tool▁call▁begin|>
<|tool▁call▁end|> <|channel|> <|message|> <|start|> <|end|><|end|>"""
_WORDS = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>"
CONTROLS, WORDS = _CONTROLS.split(), _WORDS.split()


class ChatTokenizer(Tokenizer):
    """A byte-level tokenizer with the tokens of all these families and one of their templates."""

    def __init__(self, inner, template, settings=None, bos=None, add_bos=False):
        inner = FastTokenizer.from_str(inner.to_str())
        inner.add_special_tokens(list(CONTROLS))
        inner.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
        raw = {"bos_token": bos, "add_bos_token": add_bos} | (settings or {})
        super().__init__(inner, Settings(raw=raw, template=template))


def peer(tokenizer):
    """The same tokenizer and template in transformers."""
    inner = FastTokenizer.from_str(tokenizer.inner.to_str())
    inner.encode_special_tokens = False
    named = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in tokenizer.settings.items()
        if key.endswith("_token") and key != "add_bos_token" and value is not None
    }
    theirs = PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    theirs.chat_template = tokenizer.template
    return theirs


CHATML = """
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\nAnswer well.<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""

LLAMA2 = """
{% if messages[0]['role'] == 'system' %}
    {% set turns = messages[1:] %}
    {% set before = '<<SYS>>\n' ~ messages[0]['content'] ~ '\n<</SYS>>\n\n' %}
{% else %}
    {% set turns = messages %}
    {% set before = '' %}
{% endif %}
{% for turn in turns %}
    {% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('After the optional system message, roles must alternate user/assistant') }}
    {% endif %}
    {% set words = before + turn['content'] if loop.first else turn['content'] %}
    {% if turn['role'] == 'user' %}
{{ bos_token + '[INST] ' + words.strip() + ' [/INST]' }}
    {%- elif turn['role'] == 'assistant' %}
{{ ' ' + words.strip() + ' ' + eos_token }}
    {%- endif %}
{% endfor %}
"""

LLAMA3 = """
{%- for message in messages %}
    {%- set block = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
        + message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.first %}{% set block = bos_token + block %}{% endif %}
    {{- block }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""

LLAMA31 = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string + "\n\n" + system }}
{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {%- if messages | length == 0 %}{{ raise_exception("No user message to put the tools in") }}{% endif %}
    {{- "<|start_header_id|>user<|end_header_id|>\n\nFunctions:\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- messages[0].content | trim + "<|eot_id|>" }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{ raise_exception("One tool call at a time!") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\n\n<|python_tag|>" }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or (message.content is iterable and message.content is not string) %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + (message.content or '') | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

MISTRAL = """
{%- if messages[0]["role"] == "system" %}
    {%- set system, rest = messages[0]["content"], messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- set users = rest | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == users[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val | tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{ ", " }}{% endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{ ", " }}{% else %}{{ "]" }}{% endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] }}
            {{- ', "id": "' + call.id | string + '"}' }}
            {%- if not loop.last %}{{ ", " }}{% else %}{{ "]" + eos_token }}{% endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + "}[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("Only user, assistant and tool roles are supported") }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}
"""

QWEN25 = """
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You help.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nAnswer <tool_call>\n{\\"name\\": <name>}\n</tool_call><|im_end|>\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou help.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{% set call = call.function %}{% endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- call.name }}
            {{- '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

QWEN3 = """
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{ '\n' }}{% endif %}
            {%- set call = call.function or call %}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {%- if call.arguments is string %}
                {{- call.arguments }}
            {%- else %}
                {{- call.arguments | tojson }}
            {%- endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

# The role makes the token.
PHI3 = """{% for message in messages %}{{ '<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

OLMO2 = """
{{- bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + '\n' -}}
{% elif message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + '\n' -}}
{% elif message['role'] == 'assistant' %}
{% if not loop.last %}
{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' -}}
{% else %}
{{ '<|assistant|>\n' + message['content'] + eos_token -}}
{% endif %}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>\n' -}}
{% endif %}
{% endfor %}
"""

# Without the minus signs, so that trim_blocks and lstrip_blocks decide every line end.
ZEPHYR = """{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
    {% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
    {% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
    {% endif %}
    {% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
    {% endif %}
{% endfor %}
"""

DEEPSEEK = """
{% macro calls(list) -%}
    {%- for call in list -%}
        <|tool▁call▁begin|>{{ call.function.name }}
{{ call['function']['arguments'] | string }}<|tool▁call▁end|>
    {%- endfor -%}
{%- endmacro -%}
{%- set ns = namespace(is_first=false, system='') -%}
{%- for message in messages if message.role == 'system' -%}
    {%- set ns.system = ns.system + ('\n\n' if loop.index > 1 else '') + message.content -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{ '<|User|>' + message['content'] }}
    {%- elif message['role'] == 'assistant' -%}
        {%- set content = message.content | default('', true) -%}
        {%- if '</think>' in content -%}{%- set content = content.split('</think>') | last -%}{%- endif -%}
        {{ '<|Assistant|>' ~ content ~ (calls(message.tool_calls) if message.tool_calls else '') ~ '<|end▁of▁sentence|>' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|Assistant|><think>\n' }}{%- endif -%}
"""

MARKED = """
{%- for message in messages -%}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% if message.role == 'stop' %}{% break %}{% endif %}
{% if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{% set x = 1 %}{{ message.content }}<|im_end|>{% endgeneration %}{{ x }}

{% else %}
<|im_start|>{{ message.role }}
{{ message['content'] | e if false else message['content'] }}<|im_end|>
{# a comment #}
{% endif %}
{%- endfor -%}
{{ dict(a=1) | tojson }}{{ dict.fromkeys(['k'], 2) | tojson(sort_keys=true) }}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}

"""

# Content as parts, filters with blocks, default arguments, typed output of a schema.
PARTS = """
{%- macro show(content, depth=0) -%}
    {%- if content is string -%}
        {{ content }}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}{{ part.text }}{%- else -%}[{{ part['type'] | upper }}]{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set roles = {'assistant': 'model'} -%}
{%- for message in messages -%}
    {%- filter trim -%}
        <|start|>{{ roles.get(message.role, message.role) }}<|message|>{{ show(message.content or '') }}
    {%- endfilter -%}
    {{ '<|end|>' }}
{%- endfor -%}
{%- for tool in tools or [] -%}
    {{ tool.function.name ~ ': ' ~ tool.function.parameters.properties | dictsort | map('first') | join(', ') }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>model<|message|>{%- endif -%}
"""

TEMPLATES = {
    "chatml": (CHATML, {}),
    "llama2": (LLAMA2, {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}),
    "llama3": (LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "llama31": (LLAMA31, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "mistral": (MISTRAL, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}),
    "gemma": (GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>"}),
    "qwen25": (QWEN25, {"eos_token": "<|im_end|>", "bos_token": None}),
    "qwen3": (QWEN3, {"eos_token": "<|im_end|>"}),
    "phi3": (PHI3, {"eos_token": "<|endoftext|>"}),
    "olmo2": (OLMO2, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "zephyr": (ZEPHYR, {"bos_token": "<s>", "eos_token": "</s>"}),
    "deepseek": (DEEPSEEK, {"bos_token": "<|begin▁of▁sentence|>"}),
    "marked": (MARKED, {}),
    "parts": (PARTS, {}),
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tell the weather of a place, <b>now</b> & here, in °C.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "Wo? 日本"},
                    "days": {"type": ["integer", "null"], "default": 1},
                },
                "required": ["place"],
            },
        },
    }
]


def said(*turns: object) -> list[dict[str, object]]:
    """Return user, assistant, user, … saying `turns`."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def called(arguments: object) -> list[dict[str, object]]:
    """Return a conversation with a tool call and its result."""
    call = {
        "type": "function",
        "id": "call00001",
        "function": {"name": "weather", "arguments": arguments},
    }
    return [
        {"role": "user", "content": "How is Kiel?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"°C": 12}', "tool_call_id": "call00001", "name": "weather"},
        {"role": "assistant", "content": "12 °C, it's <b>mild</b>.", "tool_calls": None},
    ]


SYSTEM = {"role": "system", "content": " Be brief & kind. "}
CONVERSATIONS = {
    "one": said("Hello there"),
    "multi": said("Hi", "  Hello! \n", "And\nyou?", "", "\n\tBye "),
    "answered": said("Hi", "Hello!"),
    "system": [SYSTEM, *said("Hi", "Hello!", "Again")],
    "late system": [*said("Hi", "Hello!"), SYSTEM, *said("Again")],
    "unicode": said(
        "naïve café 日本語 😀\u200d\u202e e\u0301", "\u2028\r\n\x00\x7f'\"\\ {{ x }} {% if %}"
    ),
    "thinking": said("1+1?", "<think>\nhm\n</think>\n\n2", "2+2?", "<think>easy</think>4"),
    "reasoning": [*said("1+1?"), {"role": "assistant", "content": "2", "reasoning": "hm\n"}],
    "called": called({"place": "Kiel", "days": 2, "none": None}),
    "called with text": called('{"place": "Kiel"}'),
    "parts": said(
        [{"type": "text", "text": "What "}, {"type": "image"}, {"type": "text", "text": "is?"}]
    ),
    "no content": [*said("Hi"), {"role": "assistant", "content": None}],
    "extra keys": [{"role": "user", "content": "Hi", "name": "Ann", "weight": 0.5, "id": 7}],
    "odd role": [{"role": "critic", "content": "Hm"}, {"role": "stop", "content": "!"}],
    "response": said("<tool_response>\nx\n</tool_response>", "ok", "go"),
}
