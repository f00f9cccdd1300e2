//! bench
mod cpu;
mod frames;
mod generator;
mod namespace;
mod receiver;
mod reference;
mod rig;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> Result<()> {
    namespace::guard()?;
    cpu::pin_to(1)?;
    let clock = cpu::Clock::of(1)?;
    let mut o = std::mem::MaybeUninit::uninit();
    let receiver = receiver::Receiver::load(&mut o, rig::CLIENT)?;
    let rig = rig::Rig::build(&receiver)?;
    for (shape, sources) in [
        (frames::Shape::Initial, generator::Sources::ONE),
        (frames::Shape::Initial, generator::Sources::ALL),
        (frames::Shape::Syn, generator::Sources::MILLION),
    ] {
        let mut o = std::mem::MaybeUninit::uninit();
        let generator = generator::Generator::load(&mut o, shape, sources, rig.client_index())?;
        let link = {
            let _n = rig.enter_node()?;
            receiver.drop_all().attach_xdp(rig.node_index() as i32)?
        };
        {
            let _c = rig.enter_client()?;
            let before = clock.now()?;
            generator.send(1_000_000)?;
            let after = clock.now()?;
            println!("{shape:?} {sources:?} {:?}", after - before);
        }
        println!("{:?} {:?} {}", rig.received()?, receiver.counts()?, generator.sent()?);
        drop(link);
        println!("cost {:?}", generator.cost(receiver.nothing(), 1_000_000)?);
    }
    {
        let _n = rig.enter_node()?;
        reference::load(&reference::ingress(rig.node_device()))?;
        reference::flush()?;
        reference::load(&reference::replica(true))?;
        reference::flush()?;
        println!("{:?}", reference::counters()?);
        println!("{:?} {:?}", reference::has_xdp_filter(), reference::load_xdp_filter(rig.node_device()));
        println!("{:?}", reference::unload_xdp_filter(rig.node_device()));
    }
    Ok(())
}
