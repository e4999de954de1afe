"""How a report looks: its style sheet, light and dark, wide and narrow. It loads nothing."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f5f6f8; --card: #fff; --ink: #14181f; --soft: #57606e; --line: #e2e5ea; --faint: #eef0f3;
  --t0: #6b7280; --t1: #2458d3; --t2: #c2410c; --t3: #0f766e; --t4: #7c3aed; --t5: #a16207; --t6: #be185d;
  --good: #166534; --good-back: #dcfce7; --wait: #854d0e; --wait-back: #fef3c7; --shadow: 0 1px 2px #1018280d; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0e1116; --card: #161a21; --ink: #e7eaef; --soft: #9aa3b1; --line: #2a303a; --faint: #1e232c;
  --t0: #8b95a5; --t1: #7ba4ff; --t2: #fb923c; --t3: #2dd4bf; --t4: #b79cff; --t5: #e3b341; --t6: #f472b6;
  --good: #86efac; --good-back: #14321f; --wait: #fcd34d; --wait-back: #3a2d0c; --shadow: none; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 64px; }
h1, h2, h3, p, figure, ul, dl, dd { margin: 0; padding: 0; }
h1 { font-size: 30px; line-height: 1.15; letter-spacing: -.02em; font-weight: 680; overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -.01em; font-weight: 650; margin: 48px 0 4px; }
h3 { font-size: 14px; font-weight: 620; }
ul { list-style: none; }
.eyebrow { color: var(--soft); font-size: 13px; margin-bottom: 6px; }
.head { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 14px; }
.status { font-size: 13px; font-weight: 600; padding: 2px 10px; border-radius: 99px; }
.status.good { color: var(--good); background: var(--good-back); }
.status.wait { color: var(--wait); background: var(--wait-back); }
.lead { color: var(--soft); max-width: 74ch; margin-top: 10px; }
.lead.big { color: var(--ink); font-size: 17px; }
.section { color: var(--soft); max-width: 86ch; margin-bottom: 16px; }
.notes { margin-top: 16px; padding: 10px 14px; border-left: 3px solid var(--t5); background: var(--card);
  font-size: 14px; overflow-wrap: anywhere; }
.card, .chart { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  box-shadow: var(--shadow); min-width: 0; }
.cards { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 14px; margin-top: 26px; }
.cards.row5 { grid-template-columns: repeat(5, minmax(0, 1fr)); }
.cards.row3 { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.cards .card { padding: 14px 16px 15px; }
.cards dt { color: var(--soft); font-size: 13px; }
.cards .value { font-size: 25px; line-height: 1.25; font-weight: 640; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; margin: 2px 0 3px; }
.cards .detail { color: var(--soft); font-size: 13px; line-height: 1.4; }
.charts { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 14px; --row: 1; }
.charts.row2 { --row: 2; } .charts.row3 { --row: 3; } .charts.row4 { --row: 4; }
.charts .chart { flex: 1 1 calc((100% - 14px * (var(--row) - 1)) / var(--row) - 1px); }
.hint { color: var(--soft); font-size: 13px; margin: 0 0 12px; }
.chart { padding: 14px 16px 8px; display: flex; flex-direction: column; }
.chart figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 14px; min-height: 24px; }
.unit { color: var(--soft); font-weight: 400; font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; font-size: 13px; color: var(--soft); }
.legend li::before { content: ""; display: inline-block; width: 14px; margin-right: 6px; vertical-align: 4px;
  border-top: 2px solid var(--tone); }
.legend .dashed::before { border-top-style: dashed; }
.legend .mark::before { width: 0; height: 12px; vertical-align: -2px; border: 0; border-left: 2px dotted var(--t0); }
.plot { display: grid; grid-template-columns: auto minmax(0, 1fr); margin-top: auto; padding-top: 8px; font-size: 12px;
  font-variant-numeric: tabular-nums; color: var(--soft); }
.area, .y { position: relative; height: 150px; }
.wide .area, .wide .y { height: 260px; }
.y span { position: absolute; right: 8px; transform: translateY(-50%); white-space: nowrap; }
.x { grid-column: 2; position: relative; height: 20px; }
.x span { position: absolute; top: 4px; transform: translateX(-50%); }
.xname { grid-column: 2; display: flex; justify-content: space-between; gap: 8px; height: 18px; white-space: nowrap; }
.xname b { font-weight: 600; color: var(--t2); }
.area { touch-action: pan-y; border-bottom: 1px solid var(--t0); user-select: none; -webkit-user-select: none; }
.area[tabindex] { cursor: crosshair; }
.area:focus-visible { outline: 2px solid var(--t1); outline-offset: 3px; border-radius: 3px; }
.area.part svg { overflow: hidden; }
.brush { position: absolute; top: 0; bottom: 0; background: var(--t1); opacity: .16; pointer-events: none; }
.zoomed { position: fixed; z-index: 5; left: 50%; bottom: 18px; transform: translateX(-50%); display: flex; gap: 12px;
  align-items: center; padding: 6px 6px 6px 16px; border-radius: 99px; background: var(--ink); color: var(--page);
  font-size: 14px; white-space: nowrap; box-shadow: 0 6px 20px #0004; font-variant-numeric: tabular-nums; }
.zoomed[hidden] { display: none; }
.zoomed button { font: inherit; font-weight: 600; border: 0; border-radius: 99px; padding: 6px 14px; cursor: pointer;
  background: var(--page); color: var(--ink); }
.area svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; display: block; }
.area path { fill: none; vector-effect: non-scaling-stroke; }
.area .grid { stroke: var(--line); }
.area .line { stroke: var(--tone); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.area .line.dashed { stroke-width: 1.5; stroke-dasharray: 5 4; stroke-linecap: butt; }
.area .band { fill: var(--tone); opacity: .2; }
.area .dots { stroke: var(--tone); stroke-width: 6; stroke-linecap: round; }
.area .mark { stroke: var(--t0); stroke-width: 1.5; stroke-dasharray: 2 3; }
.t0 { --tone: var(--t0); } .t1 { --tone: var(--t1); } .t2 { --tone: var(--t2); } .t3 { --tone: var(--t3); }
.t4 { --tone: var(--t4); } .t5 { --tone: var(--t5); } .t6 { --tone: var(--t6); }
.cursor { position: absolute; top: 0; bottom: 0; width: 0; border-left: 1px solid var(--soft); pointer-events: none; }
.cursor[hidden], .read[hidden] { display: none; }
.cursor i { position: absolute; left: -5px; width: 9px; height: 9px; margin-top: -4px; border-radius: 9px;
  background: var(--tone); border: 2px solid var(--card); }
.read { position: absolute; top: 0; padding: 5px 9px; border-radius: 7px; white-space: nowrap; z-index: 2;
  background: var(--card); color: var(--ink); border: 1px solid var(--line);
  box-shadow: 0 4px 14px #0002; pointer-events: none; }
.read b { display: block; font-weight: 620; }
.read span::before { content: ""; display: inline-block; width: 8px; height: 8px; border-radius: 8px; margin-right: 6px;
  background: var(--tone); }
.read span { display: block; }
.strip { padding: 14px 16px; margin-bottom: 14px; }
.strip .track { position: relative; height: 14px; margin: 10px 0 6px; border-radius: 7px; background: var(--faint); }
.strip .track i { position: absolute; top: 0; bottom: 0; min-width: 3px; border-radius: 4px; background: var(--t1); }
.strip .track i.evaluating { min-width: 2px; border-radius: 0; background: var(--t3); }
.strip .track b { position: absolute; top: -3px; bottom: -3px; width: 0; border-left: 2px solid var(--t2); }
.strip .track b.return { border-left: 3px solid var(--t4); top: -5px; bottom: -5px; }
.looks { display: flex; flex-wrap: wrap; gap: 0 16px; margin-top: 6px; font-size: 13px; color: var(--soft); }
.looks li::before { content: ""; display: inline-block; width: 14px; height: 8px; border-radius: 2px; margin-right: 6px;
  background: var(--t1); }
.looks .evaluating::before { background: var(--t3); }
.looks .skip::before { background: var(--t2); width: 3px; height: 12px; vertical-align: -2px; }
.looks .return::before { background: var(--t4); width: 3px; height: 12px; vertical-align: -2px; }
.strip .ends { display: flex; justify-content: space-between; gap: 12px; color: var(--soft); font-size: 12px; }
.plain { padding: 4px 16px; } .plain b { font-weight: 680; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 16px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
td { overflow-wrap: break-word; min-width: 5ch; }
table.many { min-width: 720px; }
.bars { padding: 6px 16px; }
.bars td { vertical-align: middle; }
.bars .bar { display: flex; align-items: center; gap: 10px; }
.bars .bar i { flex: 0 1 auto; height: 10px; border-radius: 3px; background: var(--t0); min-width: 2px; }
.bars .bar.best i { background: var(--t1); }
.bars .bar span { flex: none; }
.bars .best span, .bars .best th { font-weight: 640; }
.bars td.bar-cell { width: 38%; }
.images { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
.images .card { padding: 12px; }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 6px; }
.row img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 4px;
  background: var(--faint); }
.row.whole img { aspect-ratio: auto; }
.row img.small { image-rendering: pixelated; }
.row span { display: block; color: var(--soft); font-size: 12px; line-height: 1.3; margin-top: 4px; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.row span.same { color: var(--good); }
.near { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 3fr); gap: 14px; }
.near h4 { margin: 0 0 5px; font-size: 12px; font-weight: 500; color: var(--soft); }
.near .row + h4 { margin-top: 10px; }
.images .about { display: flex; justify-content: space-between; gap: 12px; font-size: 13px; margin-bottom: 8px; }
.images .about b { font-weight: 600; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.images .about span { color: var(--soft); flex: none; }
details { border-bottom: 1px solid var(--line); }
details:last-of-type { border-bottom: 0; }
.fold { padding: 2px 16px; }
summary { padding: 11px 0; cursor: pointer; font-weight: 600; font-size: 14px; }
summary span { color: var(--soft); font-weight: 400; margin-left: 8px; }
details > .inside { padding-bottom: 14px; }
pre { margin: 0; padding: 12px 14px; overflow-x: auto; background: var(--faint); border-radius: 7px;
  font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
footer { color: var(--soft); font-size: 13px; margin-top: 36px; }
@media (max-width: 1020px) { .cards[class] { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .cards .card:last-child:nth-child(odd) { grid-column: span 2; }
  .charts.row3, .charts.row4 { --row: 2; } }
@media (max-width: 760px) {
  main { padding: 24px 16px 48px; } h1 { font-size: 25px; } h2 { margin-top: 38px; } .lead.big { font-size: 16px; }
  .images { grid-template-columns: minmax(0, 1fr); } .cards { gap: 10px; margin-top: 20px; }
  .cards .card { padding: 11px 12px 12px; } .cards .value { font-size: 20px; } }
@media (max-width: 560px) { .charts, .charts[class] { --row: 1; gap: 10px; }
  .wide .area, .wide .y { height: 220px; } .chart { padding: 12px 12px 6px; }
  th, td { padding-right: 10px; }
  .bars { padding: 4px 12px; } .bars td.bar-cell { width: 36%; }
  .bars .bar { flex-direction: column; align-items: flex-start; gap: 3px; }
  .row { gap: 4px; } .row span { font-size: 11px; }
  .near { grid-template-columns: minmax(0, 1fr); } .near .asked { width: 34%; } }
@media print { .card, .chart { break-inside: avoid; } }
"""
