"""The page's style sheet: one column, one accent, light and dark, screen, telephone and paper."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark;
  --ink:#1c2430; --muted:#5b6675; --rule:#d8dde4; --plate:#ffffff; --page:#f6f7f9; --soft:#eef1f5;
  --blue:#0072b2; --orange:#e69f00; --green:#009e73; --red:#d55e00; --purple:#cc79a7; --sky:#56b4e9;
  --good:#00664a; --bad:#a84300;
  --sans: -apple-system, BlinkMacSystemFont, "Segoe UI", "Helvetica Neue", Arial, "Liberation Sans", sans-serif;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", Cambria, Georgia, "Liberation Serif", serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
@media screen and (prefers-color-scheme: dark) { :root {
  --ink:#e8ecf1; --muted:#a2adbb; --rule:#3a4451; --plate:#1a2029; --page:#12161c; --soft:#232b36;
  --blue:#56b4e9; --orange:#e6ab2a; --green:#2fc296; --red:#f0813a; --purple:#dd9cc0; --sky:#8ccdf2;
  --good:#4fd0a5; --bad:#ff9d62; } }
* { box-sizing:border-box }
html { -webkit-text-size-adjust:100% }
body { margin:0; background:var(--page); color:var(--ink); font:16px/1.55 var(--sans) }
main { max-width:914px; margin:0 auto; padding:40px 20px 72px }
.eyebrow { color:var(--muted); font-size:.875rem; margin:0 0 14px; overflow-wrap:anywhere }
.eyebrow b { color:var(--ink) }
h1 { font:400 1.72rem/1.36 var(--serif); margin:0; text-wrap:pretty; overflow-wrap:anywhere }
h1 strong { font-weight:700 }
.verdict { border-left:5px solid var(--muted); padding:2px 0 2px 22px; margin:0 0 14px }
.verdict.good { border-color:var(--green) } .verdict.good strong { color:var(--good) }
.verdict.bad { border-color:var(--red) } .verdict.bad strong { color:var(--bad) }
.caveats { margin:0 0 30px; padding:0 0 0 43px; color:var(--muted); font-size:.875rem }
nav { display:flex; flex-wrap:wrap; gap:4px 18px; font-size:.875rem; margin:0 0 30px }
a { color:var(--blue); text-underline-offset:3px }
h2 { font:700 1.3rem/1.3 var(--serif); margin:56px 0 6px }
section > p { max-width:72ch; margin:0 0 16px }
section > p.lede, section > ul { color:var(--ink) }
h3 { font-size:1rem; margin:22px 0 6px }
.card { margin:16px 0; padding:20px 22px 16px;
  background:var(--plate); border:1px solid var(--rule); border-radius:8px }
figcaption { color:var(--muted); font-size:.875rem; line-height:1.5; margin-top:12px; max-width:78ch }
.plot { display:block; width:100%; height:auto; overflow:visible; margin:0 auto 0 0 }
.plot * { stroke-linejoin:round; stroke-linecap:butt }
.plot text { font-variant-numeric:tabular-nums }
.plot.narrow { display:none }
.tiles { display:grid; grid-template-columns:repeat(3, 1fr); gap:1px; margin:0; background:var(--rule);
  border:1px solid var(--rule); border-radius:8px; overflow:hidden }
.tile { background:var(--plate); padding:15px 20px 13px }
.tile dt { color:var(--muted); font-size:.875rem }
.tile dd { margin:0; font-size:1.55rem; line-height:1.35; font-variant-numeric:tabular-nums; white-space:nowrap }
.tile dd.note { font-size:.8125rem; line-height:1.45; color:var(--muted); white-space:normal }
.scroll { overflow-x:auto; margin:16px 0 }
table { border-collapse:collapse; width:100%; font-size:.875rem; line-height:1.45 }
th { text-align:left; font-weight:600; color:var(--muted); vertical-align:bottom;
  border-bottom:1.5px solid var(--muted) }
td { border-bottom:1px solid var(--rule); vertical-align:top; overflow-wrap:break-word }
td:first-child { min-width:7.5em; overflow-wrap:anywhere }
table.slim { width:auto } .slim th, .slim td { padding-right:44px } .slim td:first-child { min-width:0 }
th, td { padding:7px 14px 7px 0 } th:last-child, td:last-child { padding-right:2px }
.n { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap }
.tag { display:inline-block; padding:0 7px; border-radius:4px; background:var(--soft);
  font-size:.8125rem; font-weight:600; white-space:nowrap }
.gap { white-space:nowrap }
.tag.good { color:var(--good) } .tag.bad { color:var(--bad) }
section > p.statement { margin:14px 0 }
.statement { border-left:3px solid var(--blue); padding-left:16px; white-space:pre-line; overflow-wrap:anywhere }
.two { display:grid; grid-template-columns:1fr 1fr; gap:0 36px } .two ul { margin:0; padding-left:20px }
.two li { margin:0 0 6px; overflow-wrap:anywhere }
.facts { display:grid; grid-template-columns:max-content 1fr; gap:6px 20px; margin:16px 0; font-size:.875rem }
.facts dt { color:var(--muted) } .facts dd { margin:0; overflow-wrap:anywhere }
code, pre { font-family:var(--mono); font-size:.8125rem }
pre { background:var(--plate); border:1px solid var(--rule); border-radius:8px; padding:14px 18px; margin:10px 0;
  white-space:pre-wrap; overflow-wrap:anywhere; line-height:1.5 }
footer { margin-top:56px; color:var(--muted); font-size:.8125rem }
@media screen and (max-width:740px) {
  main { padding:24px 14px 48px } h1 { font-size:1.32rem } .verdict { padding-left:14px } .caveats { padding-left:34px }
  .card { padding:16px 12px 12px } .plot.wide { display:none } .plot.narrow { display:block; margin:0 auto }
  .tiles { grid-template-columns:repeat(2, 1fr) } .tile { padding:12px 14px 10px } .tile dd { font-size:1.25rem }
  .tile:last-child:nth-child(odd) { grid-column:1 / -1 }
  .two { grid-template-columns:1fr } .facts { grid-template-columns:1fr; gap:0 } .facts dd { margin-bottom:10px } }
@media print, (min-width:741px) {
  .tile:last-child:nth-child(3n+1) { grid-column:1 / -1 } .tile:last-child:nth-child(3n+2) { grid-column:2 / -1 } }
@page { size:A4; margin:15mm 14mm }
@media print {
  :root { color-scheme:light; --page:#ffffff }
  body { font-size:10.5pt; background:#ffffff; print-color-adjust:exact; -webkit-print-color-adjust:exact }
  main { max-width:none; padding:0 } nav { display:none } h1 { font-size:15.5pt } .scroll { overflow:visible }
  h2 { margin-top:26pt; break-after:avoid } h3, section > p { break-after:avoid; break-inside:avoid }
  .card { padding:8px 0; border:0; border-radius:0 }
  figure, .tiles, .verdict, tr, .facts, .two, .statement { break-inside:avoid } thead { display:table-header-group }
  .tag { font-size:inherit; padding:0 4px } .tile { padding:9px 14px 8px } .tile dd { font-size:15pt }
  .tile dd.note { font-size:8.5pt } .caveats { margin-bottom:16px }
  table { font-size:8.5pt } th, td { padding-right:8px } a { color:inherit; text-decoration:none } }
"""
