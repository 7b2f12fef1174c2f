"""The look of a report: one column, two colour schemes, pictures enlarged pixel by pixel. No external requests."""

CSS = """
:root { color-scheme: light dark;
  --bg: #fbfbf9; --card: #ffffff; --ink: #1b1e23; --muted: #5b6370; --line: #e2e3e7; --accent: #2a66d9;
  --unsteered: #858c98; --best-of-n: #d0701a; --mfm-g: #2a66d9; --mfm-gf: #0b8f7d;
  --resampling: #9a3fb5; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #131519; --card: #1a1d23; --ink: #e8eaee; --muted: #9aa3b1; --line: #2d323b; --accent: #78a8ff;
  --unsteered: #8f98a6; --best-of-n: #f2a24e; --mfm-g: #78a8ff; --mfm-gf: #3fccb6;
  --resampling: #d58bec; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 16.5px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 900px; margin: 0 auto; padding: 0 22px 90px; }
header { padding: 64px 0 8px; }
.kicker { color: var(--muted); font-size: .86rem; letter-spacing: .02em; margin: 0 0 6px; }
h1 { font-size: clamp(1.9rem, 5.4vw, 2.9rem); line-height: 1.12; letter-spacing: -.022em; margin: 0 0 18px; }
h2 { font-size: 1.5rem; letter-spacing: -.012em; line-height: 1.25; margin: 68px 0 10px; }
h3 { font-size: 1.16rem; margin: 48px 0 6px; padding-top: 22px; border-top: 1px solid var(--line); }
p { max-width: 70ch; margin: 10px 0; }
.lede { font-size: 1.13rem; color: var(--muted); max-width: 64ch; }
.lede b { color: var(--ink); font-weight: 600; }
a { color: var(--accent); }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px;
  overflow-x: auto; font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 30px 0 10px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 15px 17px 14px; }
.card b { display: block; font-size: 1.5rem; white-space: nowrap; line-height: 1.15; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--muted); font-size: .86rem; line-height: 1.4; display: block; margin-top: 5px; }
figure { margin: 22px 0 6px; }
figcaption { color: var(--muted); font-size: .9rem; line-height: 1.5; max-width: 74ch; margin-top: 12px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 22px 26px;
  margin: 22px 0 6px; }
.charts.single { max-width: 440px; }
.charts.wide { grid-template-columns: 1fr; }
.chart { width: 100%; height: auto; display: block; }
.chart text { font-family: inherit !important; }
.strip { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); gap: 4px; }
.px { width: 100%; display: block; aspect-ratio: 1; border-radius: 3px; image-rendering: pixelated;
  background: repeating-linear-gradient(45deg, var(--line) 0 4px, transparent 4px 8px); }
.rows { display: grid; gap: 9px 18px; grid-template-columns: minmax(118px, 168px) 1fr; align-items: center; }
.rows > .name { font-size: .92rem; line-height: 1.3; }
.rows > .name small { color: var(--muted); display: block; font-size: .8rem; font-variant-numeric: tabular-nums; }
.rows.posterior { grid-template-columns: 62px 62px 1fr; }
.rule { grid-column: 1 / -1; border-top: 1px solid var(--line); margin: 4px 0; }
.dot { display: inline-block; width: .62em; height: .62em; border-radius: 50%; margin-right: .5em;
  background: var(--muted); }
.dot.unsteered { background: var(--unsteered); } .dot.best_of_n { background: var(--best-of-n); }
.dot.mfm_g { background: var(--mfm-g); } .dot.mfm_gf { background: var(--mfm-gf); }
.dot.resampling { background: var(--resampling); } .dot.muted { background: var(--muted); }
.scroll { overflow-x: auto; margin: 18px 0 6px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--muted); font-weight: 500; font-size: .84rem; }
th:first-child, td:first-child { text-align: left; }
tr.best td { font-weight: 600; }
.bar { display: inline-block; height: .56em; border-radius: 2px; background: var(--muted); vertical-align: middle; }
dl.methods { display: grid; grid-template-columns: max-content 1fr; gap: 7px 18px; margin: 18px 0; }
dl.methods dt { font-weight: 600; white-space: nowrap; } dl.methods dd { margin: 0; color: var(--muted); }
details { border-top: 1px solid var(--line); padding: 10px 0; } summary { cursor: pointer; }
details table td, details table th { white-space: normal; text-align: left; vertical-align: top; }
footer { color: var(--muted); font-size: .86rem; margin-top: 60px; }
@media (max-width: 620px) {
  body { font-size: 16px; } main { padding: 0 16px 60px; } header { padding-top: 36px; }
  h2 { margin-top: 52px; } .cards { grid-template-columns: 1fr 1fr; } .card b { font-size: 1.4rem; }
  .rows { grid-template-columns: 1fr; gap: 5px; } .rows > .name { margin-top: 8px; }
  .rows > .name small { display: inline; margin-left: .6em; }
  .rows.posterior { grid-template-columns: 34px 44px 1fr; gap: 10px; } .rows.posterior > .name { margin: 0; }
  .rows.posterior .strip { grid-template-columns: repeat(8, minmax(0, 1fr)); }
  .strip.wrap { grid-template-columns: repeat(10, minmax(0, 1fr)); }
  dl.methods { grid-template-columns: 1fr; gap: 2px; } dl.methods dd { margin-bottom: 8px; }
  th, td { padding-right: 10px; }
}
@media print { .card, pre { break-inside: avoid; } }
"""
