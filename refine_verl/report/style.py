"""The style sheet of `report.html`: light, dark and paper from one set of colours."""

from __future__ import annotations

# Series colours reach a contrast of 3:1 on their background and stay apart for colour-blind readers.
# No character needs escaping, so the page is well-formed XML too.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --line: #e2e5ea; --grid: #eceef2; --text: #1b2330; --muted: #5c6675;
  --good: #11704a; --poor: #a34a00; --shade: #5c66751c; --hover: #1b23300d;
  --c1: #1f66c1; --c2: #c8500a; --c3: #0f7f63; --c4: #8a4fbf; --c5: #8a93a1; --c6: #a3446b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10141b; --card: #181e27; --line: #2b3340; --grid: #252c38; --text: #e6eaf0; --muted: #98a3b3;
    --good: #4fc795; --poor: #f0a35e; --shade: #98a3b321; --hover: #ffffff0f;
    --c1: #66a8f5; --c2: #f58b4c; --c3: #45c2a0; --c4: #bd93ee; --c5: #7d8797; --c6: #e384ab;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 64px; }
header { margin-bottom: 24px; }
.kicker { color: var(--muted); font-size: 13px; margin: 0 0 2px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0; font-weight: 650; overflow-wrap: anywhere; }
.facts { color: var(--muted); margin: 6px 0 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; font-weight: 620; margin: 40px 0 12px; letter-spacing: -0.005em; }
h3 { font-size: 15px; font-weight: 620; margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 13px 14px; }
.tile p { margin: 0; }
.tile .name { color: var(--muted); font-size: 13px; }
.tile .value { font-size: 22px; font-weight: 640; line-height: 1.4; font-variant-numeric: tabular-nums; }
.tile .value small { white-space: nowrap; font-size: 13px; font-weight: 450; color: var(--muted); }
.tile .detail { color: var(--muted); font-size: 13px; font-variant-numeric: tabular-nums; }
.tile .value .good { color: var(--good); font-weight: 560; }
.tile .value .poor { color: var(--poor); font-weight: 560; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 14px; }
figure.card { margin: 0; padding: 14px 16px 8px; min-width: 0; max-width: 760px; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 12px; }
.unit { color: var(--muted); font-size: 13px; font-weight: 400; margin-left: 8px; }
.legend {
  flex-basis: 100%; min-height: 22px; margin: 2px 0 8px; padding: 0; list-style: none; display: flex;
  flex-wrap: wrap; gap: 0 16px; font-size: 13px; color: var(--muted); font-variant-numeric: tabular-nums;
}
.legend b { color: var(--text); font-weight: 560; }
.legend svg { width: 20px; height: 10px; vertical-align: 0; margin-right: 6px; }
figure svg { display: block; width: 100%; height: auto; }
.legend svg { display: inline; width: 20px; }
svg text { font-size: 11.5px; fill: var(--muted); }
svg .tick { font-variant-numeric: tabular-nums; }
.grid { stroke: var(--grid); }
.axis { stroke: var(--line); }
.grid, .axis, .line, .bad { fill: none; }
.line { stroke: var(--c); stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }
.raw { stroke-width: 1; stroke-opacity: 0.35; stroke-dasharray: none; }
.dense { stroke-opacity: 0.16; }
.d2 { stroke-dasharray: 7 4; } .d3 { stroke-dasharray: 2 4; } .d4 { stroke-dasharray: 9 3 2 3; }
.d5 { stroke-dasharray: 14 4; } .d6 { stroke-dasharray: 5 2 1 2 1 2; }
.mark { fill: var(--c); stroke: var(--card); stroke-width: 0.8; }
.band { fill: var(--c); fill-opacity: 0.13; }
.dot { fill: var(--c); stroke: var(--card); stroke-width: 0.8; }
.fill { fill: var(--c); fill-opacity: 0.88; }
.bad { stroke: var(--poor); stroke-width: 1.6; }
.warmup { fill: var(--shade); }
.hit { fill: transparent; }
.hit:hover { fill: var(--hover); }
.bar:hover { opacity: 0.75; }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); }
.panel { padding: 4px 16px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--grid); }
tr:last-child td, tr:last-child th { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 500; }
tbody th { font-weight: 450; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number, td.number { padding: 5px 0 5px 18px; }
td.number small { color: var(--muted); }
code, .key { font: 12.5px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.swatch svg { width: 34px; height: 17px; vertical-align: -4px; margin-right: 10px; }
.setting-value { overflow-wrap: anywhere; min-width: 90px; }
tbody th code { color: var(--muted); font-weight: 400; margin-left: 6px; }
.key { white-space: nowrap; padding-right: 28px; }
td.setting { width: 100%; overflow-wrap: anywhere; }
details { margin-top: 12px; }
summary { cursor: pointer; padding: 10px 16px; font-weight: 560; font-size: 14px; }
details .panel { border-top: 1px solid var(--line); }
.note { color: var(--muted); font-size: 13px; margin: 10px 0 0; }
footer { margin-top: 40px; color: var(--muted); font-size: 13px; }
@media print {
  :root {
    color-scheme: light;
    --page: #ffffff; --card: #ffffff; --line: #d5d9e0; --grid: #e6e8ec; --text: #000000; --muted: #444c58;
    --good: #11704a; --poor: #a34a00; --shade: #5c66751c;
    --c1: #1f66c1; --c2: #c8500a; --c3: #0f7f63; --c4: #8a4fbf; --c5: #8a93a1; --c6: #a3446b;
  }
  body { font-size: 12px; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0 1px; }
  h2 { break-after: avoid; margin-top: 24px; }
  svg text { font-size: 14px; }
  .unit, .legend { font-size: 11px; }
  .panel { overflow: visible; }
  table { font-size: 10px; }
  code, .key { font-size: 9.5px; }
  th, td { padding-top: 3px; padding-bottom: 3px; }
  th.number, td.number { padding: 3px 0 3px 10px; }
  .tiles { grid-template-columns: repeat(3, 1fr); }
  .charts { grid-template-columns: 1fr 1fr; }
  .tile, .card:not(.panel):not(details):not(:has(> .panel)) { break-inside: avoid; }
  tr { break-inside: avoid; }
  details:not(.screen)::details-content { content-visibility: visible; display: block; } /* nobody can unfold paper */
  details:not(.screen) summary { list-style: none; break-after: avoid; }
}
"""
