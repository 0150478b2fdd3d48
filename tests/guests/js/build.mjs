// Makes a component of server.js; build.sh calls it in a copy of this folder, where the packages are installed.
//
//     node build.mjs WIT COMPONENT        WIT: the folder of server.wit
import { readFile, writeFile } from 'node:fs/promises';
import { argv } from 'node:process';

import { componentize } from '@bytecodealliance/componentize-js';

const [witPath, output] = argv.slice(2);
const source = await readFile(new URL('server.js', import.meta.url), 'utf8');
const { component } = await componentize(source, { sourceName: 'server.js', witPath, worldName: 'server' });
await writeFile(output, component);
