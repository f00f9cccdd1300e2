//! The engines, each behind the trait [`Stack`].

#[cfg(feature = "millrace")]
pub(crate) mod millrace;
pub(crate) mod quinn;
pub(crate) mod s2n;

use crate::Result;
use crate::measure::Measurement;
use crate::plan::{Engine, Workload};
use crate::settings::Settings;
use crate::stack::{Connection, Stack};
use crate::workloads::{self, Job};

/// Serves one workload until the parent goes away.
pub(crate) fn serve(engine: Engine, workload: Workload, settings: Settings) -> Result<()> {
    match engine {
        Engine::Quinn | Engine::QuinnRef => {
            single_threaded()?.block_on(workloads::serve::<quinn::Quinn>(workload, settings))
        }
        Engine::S2n => {
            single_threaded()?.block_on(workloads::serve::<s2n::S2n>(workload, settings))
        }
        #[cfg(feature = "millrace")]
        _ => millrace::serve(engine, workload, &settings),
        #[cfg(not(feature = "millrace"))]
        _ => Err("this build has no millrace".into()),
    }
}

/// Drives one workload and reports what it saw.
pub(crate) fn drive(engine: Engine, job: Job, settings: Settings) -> Result<Measurement> {
    match engine {
        Engine::Quinn | Engine::QuinnRef => {
            single_threaded()?.block_on(workloads::drive::<quinn::Quinn>(job, settings))
        }
        Engine::S2n => single_threaded()?.block_on(workloads::drive::<s2n::S2n>(job, settings)),
        #[cfg(feature = "millrace")]
        _ => millrace::drive(engine, job, &settings),
        #[cfg(not(feature = "millrace"))]
        _ => Err("this build has no millrace".into()),
    }
}

pub(crate) fn single_threaded() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}
