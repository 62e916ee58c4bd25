"""What the page adds to the report's style sheet: tokens with their heat, marks, and the tables of rollouts."""

from __future__ import annotations

LEVELS = 9
"""Steps of the heat scale; level 0 has no colour."""

_HEAT = " ".join(
    f".h{level} {{ background: rgb(var(--heat) / {0.66 * level / (LEVELS - 1):.2f}); }}" for level in range(1, LEVELS)
)

# Text stays above a contrast of 4.5:1 on the hottest background, light and dark; paper takes the light colours.
STYLE = f"""
:root {{ --heat: 232 119 34; --same: #11704a; --tint: #11704a1f; }}
@media (prefers-color-scheme: dark) {{ :root {{ --heat: 196 84 12; --same: #4fc795; --tint: #4fc79526; }} }}
@media print {{ :root {{ --heat: 232 119 34; --same: #11704a; --tint: #11704a1f; }} }}
{_HEAT}
a {{ color: var(--c1); }}
a:focus-visible, .text:focus-visible, summary:focus-visible {{ outline: 2px solid var(--c1); outline-offset: 2px; }}
figure.wide {{ max-width: none; }}
figure.wide .scroll svg {{ min-width: 640px; }}
figure.wide svg text {{ font-size: 12px; }}
.border {{ stroke: var(--muted); stroke-width: 1; stroke-dasharray: 3 4; stroke-opacity: 0.7; }}
.stem {{ stroke: var(--c1); stroke-width: 1.2; }}
.pin {{ fill: var(--c1); stroke: var(--card); stroke-width: 1; }}
.pins text {{ fill: var(--c1); font-weight: 640; }}
.scale {{ display: flex; flex-wrap: wrap; align-items: center; gap: 4px 18px; color: var(--muted); font-size: 13px;
  margin: 0 0 10px; }}
.scale b {{ font-weight: 450; color: var(--text); padding: 1px 7px; font-variant-numeric: tabular-nums; }}
.text {{ max-height: 75vh; overflow: auto; padding: 4px 18px 14px; position: relative; }}
.chunk h3 {{ border-top: 1px dashed var(--muted); margin-top: 14px; padding-top: 5px; font-size: 12.5px;
  color: var(--muted); font-weight: 500; font-variant-numeric: tabular-nums; }}
.chunk:first-child h3 {{ border-top: 0; }}
.tokens {{
  font: 13px/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 0; tab-size: 4;
}}
.tokens span {{ border-radius: 2px; padding: 2px 0; }}
.tokens span:hover {{ outline: 1px solid var(--muted); }}
.tokens .gt {{ text-decoration: underline 2px var(--c1); text-underline-offset: 4px; }}
.tokens .same {{ background: var(--tint); color: var(--same); font-weight: 640;
  text-decoration: underline 2px var(--same); text-underline-offset: 4px; }}
.tokens i {{ font-style: normal;
  background: radial-gradient(circle at 50% 55%, var(--muted) 0.075em, transparent 0.1em) 0 0 / 1ch 100%; }}
.tokens b {{ font-weight: 400; color: var(--muted); }}
.tokens b.nl::before {{ content: "↵"; }}
.tokens b.tab::before {{ content: "⇥"; }}
.tokens b.rest::before {{ content: "▏"; }}
.tokens b.sign, .tokens b.byte {{ color: inherit; border: 1px solid var(--muted); border-radius: 3px; font-size: 10.5px;
  padding: 0 2px; margin: 0 1px; }}
.tokens .special {{ font-style: italic; border: 1px solid var(--line); }}
a.at {{
  background: var(--c1); color: var(--card); border-radius: 9px; padding: 1px 7px; margin: 0 3px; font-size: 11.5px;
  font-weight: 640; text-decoration: none; font-family: system-ui, "DejaVu Sans", sans-serif; white-space: nowrap;
}}
.position {{ margin-bottom: 12px; padding: 12px 16px 8px; scroll-margin-top: 12px; }}
.position:target, .at:target {{ outline: 2px solid var(--c2); outline-offset: 2px; }}
.position h3 a.at {{ margin: 0 8px 0 0; }}
.reading {{ margin: 0 0 12px; }}
.position .facts {{ font-size: 13px; margin: 3px 0 6px; }}
.prefix {{ border-left: 3px solid var(--line); padding-left: 10px; }}
.scroll {{ overflow-x: auto; }}
.rollouts {{ margin-top: 8px; }}
.rollouts td.tokens {{ width: 60%; min-width: 220px; }}
.rollouts tr.truth {{ background: var(--hover); }}
.rollouts th {{ white-space: nowrap; }}
.rollouts tbody th {{ color: var(--muted); padding-left: 6px; }}
.rollouts b.best {{ font-weight: 700; }}
.bars {{ width: 64px; height: 10px; vertical-align: -1px; margin-left: 8px; }}
.up {{ fill: var(--good); }} .down {{ fill: var(--poor); }}
@media print {{
  .text {{ max-height: none; overflow: visible; }}
  .tokens {{ font-size: 9.5px; line-height: 1.6; }}
  .tokens i {{ background: none; }} /* thousands of gradients take a printer minutes; heat shows where spaces are */
  .scroll {{ overflow: visible; }}
  figure.wide .scroll svg {{ min-width: 0; }}
  .rollouts td.tokens {{ min-width: 0; }}
  .chunk h3 {{ break-after: avoid; }}
  .flow.card:not(.panel):not(details) {{ break-inside: auto; }}
  .tiles {{ grid-template-columns: repeat(4, 1fr); }}
  a.at {{ font-size: 8.5px; padding: 0 4px; }}
}}
"""
