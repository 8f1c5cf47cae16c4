"""Run by test_driver.py: nine iterations in the folder that is given; prints as JSON how far it came, or the error."""

import json
import sys
from pathlib import Path

from counting_loop import RECORDS, CountingLoop, first_state

from jaxengine.rl.loops.data import InEpochs
from jaxengine.rl.loops.driver import learn
from jaxengine.rl.loops.run_folder import RunFolder

path = Path(sys.argv[1])
folder = RunFolder(path, json.loads((path / "run.json").read_text()))
try:
    outcome = learn(CountingLoop(InEpochs(RECORDS, 4)), first_state(), 9, folder=folder)
    print(json.dumps({"version": int(outcome.state.version)}))
except BlockingIOError as error:
    print(json.dumps({"error": str(error)}))
