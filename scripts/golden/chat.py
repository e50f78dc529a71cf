#!/usr/bin/env python3
"""Writes tests/golden/chat/cases.json: what transformers' Jinja makes of the known chat templates.

Needs the Python package `transformers`. Usage: chat.py [OUT]; run from the top of the tree. The
templates are those of the families without their branches for tools: for messages of text alone they
write the same. A list of {name, template, bos, eos, cases}; each case has messages, and the text or
(where the template raises) none.
"""
import json
import pathlib
import sys

from transformers.utils.chat_template_utils import _compile_jinja_template

TURNS = ("{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
         "{{ raise_exception('Conversation roles must alternate') }}{% endif %}")


def llama3(system):
    return ("{{- bos_token }}\n" + system + "{%- for message in messages %}\n"
            "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ "
            "message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
            "{%- if add_generation_prompt %}\n"
            "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n")


def llama31(date):
    return llama3(
        "{%- if not date_string is defined %}\n" + date + "{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = \"\" %}\n"
        "{%- endif %}\n"
        "{{- \"<|start_header_id|>system<|end_header_id|>\\n\\n\" }}\n"
        "{{- \"Cutting Knowledge Date: December 2023\\n\" }}\n"
        "{{- \"Today Date: \" + date_string + \"\\n\\n\" }}\n{{- system_message }}\n"
        "{{- \"<|eot_id|>\" }}\n")


def mistral(user, answer, system, single_quotes=False, check=TURNS):
    """user: ("[INST] ", " [/INST]"); system: "first", "last" or None."""
    text = (check if system is None else "") + "{%- for message in loop_messages %}" + (
        "" if system is None else check) + "{%- if message['role'] == 'user' %}"
    if system is None:
        text = "{%- for message in loop_messages %}" + check + "{%- if message['role'] == 'user' %}"
    else:
        text += ("{%- if loop." + system + " and system_message is defined %}"
                 "{{- '" + user[0] + "' + system_message + '\\n\\n' + message['content'] + '"
                 + user[1] + "' }}{%- else %}")
    text += "{{- '" + user[0] + "' + message['content'] + '" + user[1] + "' }}"
    text += "" if system is None else "{%- endif %}"
    text += ("{%- elif message['role'] == 'assistant' %}{{- " + answer + " }}{%- else %}"
             "{{- raise_exception('Only user and assistant roles are supported!') }}"
             "{%- endif %}{%- endfor %}")
    begin = "{%- set loop_messages = messages %}"
    if system is not None:
        begin = ("{%- if messages[0]['role'] == 'system' %}"
                 "{%- set system_message = messages[0]['content'] %}"
                 "{%- set loop_messages = messages[1:] %}{%- else %}"
                 "{%- set loop_messages = messages %}{%- endif %}")
    text = begin + "{{- bos_token }}" + text
    return text if single_quotes else text.replace("'", '"')


CHATML_LOOP = ("{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
               "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
QWEN25 = r"""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
GEMMA3 = r"""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim }}
    {{- '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""
DEEPSEEK_BEGIN = ("{% set ns = namespace(is_first=false, system_prompt='', is_first_sp=true) %}"
                  "{%- for message in messages %}{%- if message['role'] == 'system' %}")
DEEPSEEK_LAST = DEEPSEEK_BEGIN.replace(", is_first_sp=true", "") + (
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}")
DEEPSEEK_ALL = DEEPSEEK_BEGIN + (
    "{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}"
    "{% set ns.is_first_sp = false %}{%- else %}"
    "{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}"
    "{%- endif %}{%- endfor %}")


def deepseek(system, answer="message['content']", think=""):
    return (system + "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}"
            "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
            "{%- if message['role'] == 'assistant' %}{% set content = " + answer + " %}"
            "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor %}"
            "{% if add_generation_prompt %}{{'<｜Assistant｜>" + think + "'}}{% endif %}")


SPLIT_THOUGHT = "message['content'].split('</think>')[-1]"

TEMPLATES = {
    "llama2": ("<s>", "</s>", "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
               "{% set system_message = messages[0]['content'] %}{% else %}"
               "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
               "{% for message in loop_messages %}" + TURNS +
               "{% if loop.index0 == 0 and system_message != false %}"
               "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
               "{% else %}{% set content = message['content'] %}{% endif %}"
               "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
               "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
               "{% endif %}{% endfor %}"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", llama3("")),
    "llama31": ("<|begin_of_text|>", "<|eot_id|>",
                llama31("    {%- set date_string = \"26 Jul 2024\" %}\n")),
    "llama32": ("<|begin_of_text|>", "<|eot_id|>", llama31(
        "    {%- if strftime_now is defined %}\n"
        "        {%- set date_string = strftime_now(\"%d %b %Y\") %}\n    {%- else %}\n"
        "        {%- set date_string = \"26 Jul 2024\" %}\n    {%- endif %}\n")),
    "mistral_old": ("<s>", "</s>", mistral(("[INST] ", " [/INST]"), "message['content'] + eos_token",
                                           None, True)),
    "mistral_oldest": ("<s>", "</s>", mistral(
        ("[INST] ", " [/INST]"), "message['content'] + eos_token + ' '", None, True)),
    "mistral_v1": ("<s>", "</s>", mistral((" [INST] ", " [/INST]"),
                                          "' ' + message['content'] + eos_token", "first", True)),
    "mistral_v3": ("<s>", "</s>", mistral(("[INST] ", "[/INST]"),
                                          "' ' + message['content']|trim + eos_token", "last")),
    "mistral_tekken": ("<s>", "</s>", mistral(("[INST]", "[/INST]"),
                                              "message['content'] + eos_token", "last")),
    "chatml": ("<s>", "<|im_end|>", "{% for message in messages %}" + CHATML_LOOP),
    "qwen2": ("", "<|im_end|>", "{% for message in messages %}"
              "{% if loop.first and messages[0]['role'] != 'system' %}"
              "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
              + CHATML_LOOP),
    "qwen2_line_ends": ("", "<|im_end|>", "{% for message in messages %}"
                        "{% if loop.first and messages[0]['role'] != 'system' %}"
                        "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
                        + CHATML_LOOP.replace("\\n", "\n")),
    "qwen25": ("", "<|im_end|>", QWEN25),
    "qwen25_math": ("", "<|im_end|>", QWEN25.replace(
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        r"Please reason step by step, and put your final answer within \\boxed{}.")
        .replace("boxed{}", "boxed")),
    "qwen3": ("", "<|im_end|>", QWEN3),
    "qwen3_thinking": ("", "<|im_end|>", QWEN3.replace(
        "{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")),
    "gemma": ("<bos>", "<eos>", "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
              "{{ raise_exception('System role not supported') }}{% endif %}"
              "{% for message in messages %}" + TURNS + "{% if (message['role'] == 'assistant') %}"
              "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
              "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
              "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"),
    "gemma3": ("<bos>", "<eos>", GEMMA3),
    "deepseek_v2": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
                    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
                    "{{ 'User: ' + message['content'] + '\\n\\n' }}{% elif message['role'] == 'assistant' %}"
                    "{{ 'Assistant: ' + message['content'] + eos_token }}"
                    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}{% endif %}"
                    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"),
    "deepseek_v3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", deepseek(DEEPSEEK_LAST)),
    "deepseek_v3_0324": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", deepseek(DEEPSEEK_ALL)),
    "deepseek_r1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
                    deepseek(DEEPSEEK_ALL, SPLIT_THOUGHT, "<think>\\n")),
}

S, U, A = "system", "user", "assistant"
CONVERSATIONS = [
    [(U, "Hello")],
    [(S, "You are a pirate."), (U, "Hello")],
    [(U, "Hello"), (A, "Hi there"), (U, "Who are you?")],
    [(S, "  Be\nbrief. "), (U, " Hello\t"), (A, "   I am an assistant \u00a0\n"), (U, "\nWho? 你好\u3000")],
    [(U, ""), (A, ""), (U, " ")],
    [(U, "a"), (A, "<think>\nhm\n</think>\n\nb"), (U, "c"), (A, "<think>\n\nx <think>y\n\n</think>\n\nz")],
    [(U, "a"), (A, "b</think>c</think>\n\nd"), (U, "e"), (A, "f"), (A, "g")],
    [(U, "a"), (A, "one"), (A, "</think>two")],
    [(A, "first"), (U, "then")],
    [(U, "one"), (U, "two")],
    [(U, "one"), (S, "late"), (U, "two")],
    [(S, "one"), (S, "two"), (U, "three"), (A, "four"), (U, "<tool_response>5</tool_response>")],
    [(U, "it's \"quoted\" {{ braces }} <b>&amp;</b>"), (A, "'")],
]


def main():
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/chat")
    out.mkdir(parents=True, exist_ok=True)
    result = []
    for name, (bos, eos, text) in TEMPLATES.items():
        compiled = _compile_jinja_template(text)
        cases = []
        for conversation in CONVERSATIONS:
            messages = [{"role": role, "content": content} for role, content in conversation]
            case = {"messages": messages}
            try:
                case["text"] = compiled.render(
                    messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos,
                    strftime_now=lambda _: "05 Feb 2026")
            except Exception as error:
                print(f"{name}: {error}")
            cases.append(case)
        result.append({"name": name, "template": text, "bos": bos, "eos": eos, "cases": cases})
    (out / "cases.json").write_text(json.dumps(result, ensure_ascii=False, indent=0) + "\n")
    print(f"{len(result)} templates")


if __name__ == "__main__":
    main()
