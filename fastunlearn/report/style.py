"""The look of a report: readable on a phone, in the dark, on paper; every pair of colours has a contrast of 4.5 or more, lines of 3."""

CSS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1b1f;--soft:#55565c;--rule:#d5d6dc;--card:#f4f5f8;--link:#0b57d0;--good:#146c2e;
--bad:#a50e0e;--heat:#0b57d0;--s0:#0b57d0;--s1:#b3261e;--s2:#146c2e;--s3:#7b3fa0;--s4:#8a5000;--s5:#00696f}
@media (prefers-color-scheme:dark){:root{--paper:#121316;--ink:#e6e6ea;--soft:#a9abb3;--rule:#3b3d44;--card:#1d1f24;--link:#a8c7fa;
--good:#81c995;--bad:#f6aea9;--heat:#a8c7fa;--s0:#8ab4f8;--s1:#f28b82;--s2:#81c995;--s3:#d7aefb;--s4:#fdd663;--s5:#78d9ec}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
overflow-wrap:break-word}
header,main,footer{max-width:72rem;margin:0 auto;padding:0 1rem}
header{padding-top:1.5rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.3rem;margin:2.2rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--rule)}
h3{font-size:1.05rem;margin:1.4rem 0 .5rem}
h4{font-size:1rem;font-weight:600;margin:0 0 .5rem}
p{margin:.4rem 0 .8rem;max-width:48rem}
a{color:var(--link)}
a:focus-visible,summary:focus-visible,[tabindex]:focus-visible{outline:3px solid var(--link);outline-offset:2px}
nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1rem;list-style:none;padding:0;margin:.8rem 0}
nav a{display:inline-block;padding:.25rem 0}
.skip{position:absolute;left:-100vw}
.skip:focus{left:1rem;top:.5rem;background:var(--paper);padding:.5rem;z-index:1}
.quiet{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.soft{color:var(--soft)}
.note{border-left:4px solid var(--s4);padding:.3rem .8rem;background:var(--card)}
.good{color:var(--good);font-weight:600}
.bad{color:var(--bad);font-weight:600}
.scroll{overflow-x:auto;position:relative;margin:.4rem 0 1rem}
table{border-collapse:collapse;min-width:min(100%,24rem)}
caption{text-align:left;color:var(--soft);font-size:.9rem;padding-bottom:.3rem}
th,td{text-align:left;vertical-align:top;padding:.35rem .8rem .35rem 0;border-bottom:1px solid var(--rule)}
thead th{border-bottom:2px solid var(--soft)}
tbody th{font-weight:500}
td{max-width:34rem}
.numbers{min-width:min(100%,36rem)}
.numbers td,.numbers thead th:not(:first-child){text-align:right;font-variant-numeric:tabular-nums}
pre{background:var(--card);padding:.8rem;overflow-x:auto;font-size:.88rem;white-space:pre-wrap;overflow-wrap:anywhere}
details{margin:.2rem 0 1rem}
summary{cursor:pointer;color:var(--link);padding:.2rem 0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1rem}
.maps{display:flex;flex-wrap:wrap;gap:1rem 2.5rem}
figure{margin:0;min-width:0;max-width:100%}
figcaption{font-size:.92rem;color:var(--soft);margin:.2rem 0}
svg.chart{width:100%;height:auto;max-width:32rem;display:block}
svg.heat{display:block;max-width:none}
svg text{font:10.5px system-ui,sans-serif;fill:var(--soft)}
.grid{stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.cell{fill:var(--heat);stroke:var(--rule);stroke-width:.7}
.mark{fill:var(--bad)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;padding:0;margin:.4rem 0}
.swatch{vertical-align:middle;margin-right:.4rem}
line.s0,polyline.s0{stroke:var(--s0)}line.s1,polyline.s1{stroke:var(--s1)}line.s2,polyline.s2{stroke:var(--s2)}
line.s3,polyline.s3{stroke:var(--s3)}line.s4,polyline.s4{stroke:var(--s4)}line.s5,polyline.s5{stroke:var(--s5)}
.dot.s0{fill:var(--s0)}.dot.s1{fill:var(--s1)}.dot.s2{fill:var(--s2)}.dot.s3{fill:var(--s3)}.dot.s4{fill:var(--s4)}.dot.s5{fill:var(--s5)}
.sample{background:var(--card);border-radius:.4rem;padding:.7rem .9rem;margin:.6rem 0}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,14rem),1fr));gap:.6rem 1rem}
.pictures{display:flex;flex-wrap:wrap;gap:.6rem 1rem}
.side p{margin:0}
.side p.who{color:var(--soft);font-size:.9rem}
blockquote{margin:.1rem 0;padding-left:.6rem;border-left:3px solid var(--rule);white-space:pre-wrap;overflow-wrap:anywhere}
img{display:block;width:128px;max-width:100%;height:auto;image-rendering:auto;background:var(--rule)}
footer{margin-top:2rem;padding-bottom:2rem;border-top:1px solid var(--rule);color:var(--soft);font-size:.9rem}
@media (max-width:30rem){body{font-size:15px}h1{font-size:1.4rem}.pictures img{width:40vw}}
@media print{.skip,nav{display:none}.scroll{overflow:visible}.sample,figure,tr{break-inside:avoid}}
"""
