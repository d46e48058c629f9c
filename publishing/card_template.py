"""The text of a model card, as a Jinja template for `huggingface_hub.ModelCard.from_template`.

`model_card.py` says what each variable holds. A section without content is left out. Texts of the author are values of
variables, so nothing in them is taken for a template.
"""

MARK = "<!-- This card was written by urform; without this line it is yours, and is kept when you publish again. -->"

TEMPLATE = """\
{%- macro table(rows) -%}
{%- for row in rows %}
| {{ row | join(" | ") }} |
{%- if loop.first %}
|{{ " --- |" * (row | length) }}
{%- endif %}
{%- endfor %}
{%- endmacro -%}
---
{{ card_data }}
---

# {{ title }}
{%- if description %}

{{ description }}
{%- endif %}

{{ article }} {{ config.architecture }} Transformer ({{ head }}) made with urform {{ version }}: {{ layers }} layers, \
{{ config.hidden_size }} wide, {{ "{:,}".format(config.vocab_size) }} tokens, \
{{ "{:,}".format(parameters) }} parameters; positions: {{ config.position_encoding }}, norm: {{ config.norm_type }}, \
{{ config.norm_position }}.
{%- if intended_use %}

## Intended use

{{ intended_use }}
{%- endif %}

## How to use
{%- if not code %}

This repository holds no code: urform must be installed.
{%- endif %}

Urform is not on a package index yet. Install it with {{ how_to_install }}.
{%- if verified %}

Each of these snippets was run before publication, exactly as printed.
{%- endif %}
{%- for snippet in snippets %}

{{ snippet.title }}:

```python
{{ snippet.code }}
```
{%- endfor %}
{%- if results or record.best %}

## Results
{% if results %}{{ table([("metric", "value", "data", "signature")] + results) }}{% endif %}
{%- if record.best %}
{%- if results %}
{% endif %}
Best {{ record.best[0] }}: {{ "%.4g" % record.best[1] }}\
{% if record.best[2] %}, at step {{ record.best[2] }}{% endif %}.
{%- endif %}
{%- endif %}
{%- if training_data or data %}

## Training data
{%- if training_data %}

{{ training_data }}
{%- endif %}
{%- if data %}

{% if data.task %}Task: {{ data.task }}. {% endif %}Data: {{ data_name }}.
{%- for name in limits %}{{ " Limits: " if loop.first else ", " }}{{ name }} {{ data[name] }}\
{{ "." if loop.last }}{% endfor %}
{%- endif %}
{%- endif %}
{%- if record.steps or record.arguments or has_curve %}

## Training
{%- if record.steps %}

{{ "{:,}".format(record.steps) }} updates{% if record.epochs %}, {{ "%.3g" % record.epochs }} epochs{% endif %}.
{%- endif %}
{%- if record.arguments %}
{{ table([("argument", "value")] + arguments) }}
{%- endif %}
{%- if has_curve %}

![Loss over steps]({{ curve_name }})
{%- endif %}
{%- endif %}
{%- if record.flops or record.seconds %}

## Compute
{%- if record.flops %}

{{ "%.3g" % record.flops }} floating-point operations, as Trainer counts them: 6 x tokens x parameters without \
embeddings.
{%- endif %}
{%- if record.seconds %}
{%- set seconds, power = "{:,.0f}".format(record.seconds), "{:,.0f}".format(watts) %}

Energy, estimated: seconds x watts per device x devices / 3,600,000 = \
{{ seconds }} x {{ power }} x {{ record.processes }} / 3,600,000 = \
{{ "%.3g" % (record.seconds * watts * record.processes / 3.6e6) }} kWh. The {{ power }} W are \
{{ "stated by the author" if power_watts else "an assumption, not a measurement" }}\
{% if record.device %}; device: {{ record.device }}{% endif %}.
{%- endif %}
{%- endif %}
{%- if has_alignment %}

## Attention alignment

What the last decoder layer attends to (mean over heads) while it writes. Input below, output at the left.

![Attention alignment]({{ alignment_name }})
{%- endif %}

## Limitations
{% set ends = "Inputs are limited to %d tokens: positions are a learned table." % config.max_position_embeddings %}
{%- set has_end = config.position_encoding == "learned" %}
{%- if limitations %}
{{ limitations }}
{%- if has_end %}

{{ ends }}
{%- endif %}
{%- else %}
{%- if has_end %}
- {{ ends }}
{%- endif %}
{%- if record.results or record.test %}
- Nothing is known about its quality beyond the results above.
{%- else %}
- No results are recorded: how good the model is was not measured, or not here.
{%- endif %}
- It repeats what its training data say, including their errors and prejudices.
{%- endif %}

## Checking the files

`urform doctor bundle {{ repo_id }}` compares every file with the sha256 that it was published with. Weights are \
safetensors; nothing is pickled.
{%- if citation %}

## Citation

{{ citation }}
{%- endif %}

{{ mark }}

"""
