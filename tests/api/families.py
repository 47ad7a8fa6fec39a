"""Small chat templates of the shapes that models' templates have: what they insist on, branch on and leave out."""

from __future__ import annotations

# Only the first message may be a system message; one tool call at a time; arguments as an object.
ONE_CALL = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] -%}
{% else %}{% set system = '' %}{% endif -%}
[sys]{{ system | trim }}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}[/sys]
{%- for m in messages %}
{%- if m.role not in ('user', 'assistant', 'tool') %}{{ raise_exception('role ' + m.role) }}{% endif %}
{%- if m.tool_calls is defined %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif -%}
{%- set f = m.tool_calls[0].function -%}
[call]{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}
{%- else %}[{{ m.role }}]{{ m.content | trim }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""

# Roles take turns, checked; ids of nine characters; a message is text or calls.
TURNS = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{%- set turns = namespace(count=0) %}
{%- for m in messages if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
{%- if (m.role == 'user') != (turns.count % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set turns.count = turns.count + 1 %}
{%- endfor %}
{%- if tools %}[tools]{{ tools | tojson }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}[user]{{ (system if loop.last else '') + m.content }}
{%- elif m.tool_calls %}
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif -%}
[call {{ call.id }}]{{ call.function | tojson }}
{%- endfor %}
{%- elif m.role == 'assistant' %}[assistant]{{ m.content }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif -%}
[result {{ m.tool_call_id }}]{{ m.content }}
{%- else %}{{ raise_exception('role ' + m.role) }}{% endif %}
{%- endfor %}"""

# No system role, no tools, roles take turns.
NO_SYSTEM = """\
{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
<turn>{{ 'model' if m.role == 'assistant' else m.role }} {{ m.content | trim }}</turn>
{%- endfor %}"""

# Calls only beside a content of none; arguments as text.
NONE_OR_CALLS = """\
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}{% endif %}
{%- if m.role == 'user' %}<User>{{ m.content }}{% endif %}
{%- if m.role == 'assistant' and m.content is none %}<Assistant>
{%- for call in m.tool_calls %}<call>{{ call.function.name + ' ' + call.function.arguments }}</call>{% endfor %}
{%- endif %}
{%- if m.role == 'assistant' and m.content is not none %}<Assistant>{{ m.content }}<end>{% endif %}
{%- if m.role == 'tool' %}<result>{{ m.content }}</result>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<Assistant>{% endif %}"""

# Items of arguments, content as text or parts, reasoning.
ITEMS = """\
{%- macro shown(content) %}
{%- if content is string %}{{ content }}
{%- else %}{% for part in content %}{{ part.text }}{% endfor %}{% endif %}
{%- endmacro %}
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}
{%- for m in messages %}<|{{ m.role }}|>
{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- if m.content %}{{ shown(m.content) }}{% endif %}
{%- for call in m.tool_calls or [] %}<{{ call.function.name }}>
{%- for key, value in call.function.arguments.items() %}<{{ key }}>{{ value }}</{{ key }}>{% endfor %}
{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

# Knows developers, and drops every instruction but the first.
DEVELOPER = """\
{%- if messages[0].role in ('developer', 'system') %}<|developer|>{{ messages[0].content }}{% endif %}
{%- for m in messages if m.role not in ('developer', 'system') %}
{%- if m.thinking %}<|analysis|>{{ m.thinking }}{% endif %}<|{{ m.role }}|>{{ m.content }}
{%- for call in m.tool_calls or [] %}<|call {{ call.function.name }}|>{{ call.function.arguments | tojson }}{% endfor %}
{%- endfor %}"""

# Content in parts only: a string shows nothing.
PARTS_ONLY = """\
{%- for m in messages %}{{ m.role | capitalize }}:
{%- for part in m.content %}{% if part.type == 'image' %}<image>{% elif part.type == 'text' %}{{ part.text }}{% endif %}
{%- endfor %}<end>
{%- endfor %}"""

# Prints any role, knows nothing of tools.
ANY_ROLE = """\
{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""
