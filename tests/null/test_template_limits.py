"""Chat templates that would take the machine: each ends soon, in one line; what real ones do is written as before."""

from __future__ import annotations

import threading
import time

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from secateur.runtime.chat import ChatTemplate
from secateur.runtime.errors import BundleError, SecateurError
from secateur.runtime.template_limits import CHARACTERS, STEPS

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
LONG = "{% set s = 'x' * 1000000 %}"
DOUBLED = "{% set ns = namespace(a=['x'], s='x') %}{% for _ in range(60) %}"
ENDLESS = {
    "nested loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "nested loops that print": "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
    "loops with a condition": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops through loop": "{% for a in range(99) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "macros that call themselves twice": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}"
    ),
    "macros without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "call blocks": (
        "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call f() %}" * 25 + "x" + "{% endcall %}" * 25
    ),
    "text times a number": "{{ 'x' * 10**9 }}",
    "a list times a number": "{{ ([1] * 10**9)|length }}",
    "a list of lists times a number": "{{ [[1] * 10**6] * 10**6 }}",
    "a number of many digits": "{{ 10 ** (10 ** 9) }}",
    "squares": DOUBLED.replace("s='x'", "s=7") + "{% set ns.s = ns.s * ns.s %}{% endfor %}",
    "text joined with itself": DOUBLED + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "text added to itself": DOUBLED + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "text set in blocks": DOUBLED + "{% set b %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = b %}{% endfor %}",
    "lists added to themselves": DOUBLED + "{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "lists of themselves": DOUBLED + "{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "tuples of themselves": DOUBLED + "{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ {ns.a: 1} }}",
    "dictionaries of themselves": DOUBLED + "{% set ns.a = {'a': ns.a, 'b': ns.a} %}{% endfor %}{{ ns.a|tojson }}",
    "dict of themselves": DOUBLED + "{% set ns.a = dict(a=ns.a, b=ns.a) %}{% endfor %}{{ ns.a|string }}",
    "filter center": "{{ 'x'|center(10**9) }}",
    "filter batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "filter slice": "{{ [1]|slice(10**9)|list }}",
    "filter indent": LONG + "{{ ('\n' * 100000)|indent(100000, true) }}",
    "filter indent by text": LONG + "{{ ('\n' * 100000)|indent(s, true) }}",
    "filter join": LONG + "{{ range(100000)|join(s) }}",
    "filter replace": LONG + "{{ s|replace('x', s) }}",
    "filter format": "{{ '%1000000000d'|format(1) }}",
    "filter wordwrap": LONG + "{{ s|wordwrap(1, true, s) }}",
    "filter tojson, indented": "{{ [[1, 2], [3]]|tojson(indent=10**9) }}",
    "filter tojson, separated": LONG + "{{ range(100000)|list|tojson(separators=(s, s)) }}",
    "filter sum of lists": "{{ ([[1]] * 200000)|sum(start=[])|length }}",
    "filter map in loops": "{% for a in range(99999) %}{% set b = range(99999)|map('string')|list %}{% endfor %}",
    "filter list in loops": "{% for a in range(99999) %}{% set b = range(99999)|list %}{% endfor %}",
    "filter urlize": LONG + "{{ s|urlize }}",
    "filter striptags": "{{ ('<' * 1000000)|striptags }}",
    "a block of a filter": "{% filter center(10**9) %}x{% endfilter %}",
    "method center": "{{ 'x'.center(10**9) }}",
    "method ljust": "{{ 'x'.ljust(width=10**9) if false else 'x'.ljust(10**9) }}",
    "method zfill": "{{ 'x'.zfill(10**9) }}",
    "method expandtabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "method replace": LONG + "{{ s.replace('x', s) }}",
    "method join": LONG + "{{ s.join(range(100000)|map('string')) }}",
    "method translate": LONG + "{{ s.translate({120: s}) }}",
    "method format": "{{ '{:1000000000d}'.format(1) }}",
    "method format, nested": "{{ '{:{w}d}'.format(1, w=10**9) }}",
    "method format, many fields": LONG + "{{ ('{0}' * 100000).format(s) }}",
    "bytes": "{{ 'x'.encode().center(10**9) }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent with a star": "{{ '%*d' % (10**9, 1) }}",
    "percent, many fields": LONG + "{{ ('%(a)s' * 100000) % {'a': s} }}",
    "pieces kept in a macro": (
        LONG + "{% macro f() %}{% for a in range(99999) %}{{ s ~ a }}{% endfor %}{% endmacro %}{{ f() }}"
    ),
    "much text": LONG + "{% for a in range(99999) %}{{ s }}{% endfor %}",
    "dates": "{{ strftime_now('%Y' * 1000000) }}",
    "a range": "{% for a in range(10**9) %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_endless_templates_end(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.runtime.template_limits.STEPS", STEPS // 10)  # the test is sooner over
    start = time.monotonic()
    with pytest.raises(SecateurError) as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    assert time.monotonic() - start < 20
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("chat_template.jinja: the chat template ")
    assert len(str(caught.value)) < 500


def test_what_is_said() -> None:
    with pytest.raises(BundleError) as caught:
        ChatTemplate(ENDLESS["nested loops"], {}).render([])
    assert str(caught.value) == (
        f"chat_template.jinja: the chat template takes more than {STEPS + 1000} steps; do not use this bundle unless "
        "you trust where it came from"
    )
    with pytest.raises(BundleError, match=f"writes more than {CHARACTERS} characters"):
        ChatTemplate(ENDLESS["text times a number"], {}).render([])
    # A tab becomes as many blanks as are asked for: 12,000 times 12,000 characters.
    with pytest.raises(BundleError, match=f"writes more than {CHARACTERS} characters"):
        ChatTemplate("{{ ('\t' * 12000).expandtabs(12000) | length }}", {}).render([])
    with pytest.raises(SecateurError) as caught:
        ChatTemplate("{{ raise_exception('a\n' * 5000) }}", {}).render([])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.runtime.template_limits.SECONDS", 0.05)
    with pytest.raises(BundleError, match=r"takes more than 0\.05 seconds"):
        ChatTemplate(ENDLESS["nested loops"], {}).render([])


@pytest.mark.parametrize(
    "source",
    ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% for a in [1] %}" * 40 + "{% endfor %}" * 40, "x" * 1_000_001,
     "{{ " + "9" * 5000 + " }}", "{% if a %}" * 2000 + "{% endif %}" * 2000, "{{ x|nothing }}"],
)  # fmt: skip
def test_sources_that_cannot_be_compiled(source: str) -> None:
    with pytest.raises(BundleError, match=r"^chat_template.jinja: the chat template [^\n]{5,500}$"):
        ChatTemplate(source, {}).render([])


def test_long_conversations_are_no_matter() -> None:
    """A quadratic walk over a thousand turns with ten megabytes of text, as templates of tools and thoughts do it."""
    source = (
        "{%- set ns = namespace(last=0, seen=[]) -%}{%- for m in messages -%}{%- set outer = loop -%}"
        "{%- for later in messages[loop.index:] -%}{%- if later.role == 'none' -%}{%- set ns.last = 1 -%}{%- endif -%}"
        "{%- endfor -%}{%- set ns.seen = ns.seen + [m.role] -%}"
        "{{ '<|' ~ m.role ~ '|>' + m.content.split('</think>')[-1].strip() | trim | replace('a', 'b') + '\n' }}"
        "{%- endfor -%}{{ messages|length }} {{ ns.seen|length }} "
        "{{ messages|map(attribute='role')|unique|list|tojson }}"
    )
    messages = [{"role": ("user", "assistant")[turn % 2], "content": "a" * 10000} for turn in range(1000)]
    text = ChatTemplate(source, {}).render(messages)
    assert text.count("b" * 10000) == 1000
    assert text.endswith('1000 1000 ["user", "assistant"]')


def test_what_is_counted_is_written_as_jinja_writes_it() -> None:
    source = (
        "{% macro f(a, b=2) %}{{ a ~ b }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}"
        "{% call f(3, b=4) %}c{% endcall %}"
        "{% for a in [1, [2, 3]] recursive %}{{ loop(a) if a is iterable else a }}{{ loop.last }}{% endfor %}"
        "{% for a, b in {'x': (1, 2)}.items() if b %}{{ a }}{{ b }}{{ loop.length }}{% else %}no{% endfor %}"
        "{{ [3, 1]|sort|join(',') }}{{ 'a-%s' % 'b' }}{{ '{:>3}'.format('c') }}{{ '%s'|format('d') }}{{ 'x' * 3 }}"
        "{{ [1] + [2] }}{{ 2 ** 10 }}{{ none }}{{ missing }}{{ true }}{{ 1.5 }}{{ '<'|e ~ '>' }}"
        "{% set s %}{{ 1 }}2{% endset %}{{ s }}{% filter upper %}u{% endfilter %}{{ ['a', 'b']|map('upper')|list }}"
        "{{ 'a,b'.split(',')|last }}{{ dict(a=1).a }}{{ (messages|selectattr('role', 'equalto', 'user')|first).role }}"
    )
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    assert ChatTemplate(source, {}).render(MESSAGES) == plain.render(messages=MESSAGES)


def test_each_thread_has_its_own_budget() -> None:
    source = "{% for a in range(99999) %}{% for b in range(10) %}{% endfor %}{% endfor %}done"
    template, found = ChatTemplate(source, {}), []
    threads = [threading.Thread(target=lambda: found.append(template.render(MESSAGES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["done"] * 4
